"""From seconds to what a person reads: ratios first, then rates, each a median and its range over the rounds.

    prefill tokens/s  =  prompts * their length / seconds(1 token)
    decode tokens/s   =  prompts * (n - d) / (seconds(n tokens) - seconds(d tokens))      of one round; d: a dispatch

A ratio is that of one round, where the engines ran one after the other; its median is not the ratio of the medians.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

OURS = "ring-jax"
Rates = dict[str, list[float]]  # tokens/s by engine, one a round


class Spread(NamedTuple):
  median: float
  low: float
  high: float

  @classmethod
  def of(cls, values: Sequence[float]) -> "Spread":
    return cls(statistics.median(values), min(values), max(values))


def summary(rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
  """{"ratio": {peer: spread}, "tokens_per_second": {engine: spread}}."""
  ratios = {
    name: Spread.of([ours / other for ours, other in zip(rates[OURS], values, strict=True)])._asdict()
    for name, values in rates.items()
    if name != OURS
  }
  return {"ratio": ratios, "tokens_per_second": {name: Spread.of(values)._asdict() for name, values in rates.items()}}


def lines(result: Mapping[str, Any]) -> list[str]:
  """The whole report."""
  machine = result["machine"]
  versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
  out = [
    f"{result['model']}: {result['parameters']:,} parameters, {result['dtype']}; {machine['processor']},"
    f" {machine['threads']} threads for every engine, {machine['clock']} time; ours cut by {result['cut']}",
    f"{versions}; {result['rounds']} rounds in turns, median [range]",
    *(f"{name}: not there ({reason})" for name, reason in result["absent"].items()),
  ]
  for phase, what in (("decode", result["decode_shape"]), ("prefill", result["prefill_shape"])):
    out.append(f"{phase} ({what}): times ours over theirs, and tokens/s")
    for batch, cell in result[phase].items():
      ratios = [f"{_text(spread, '.2f')}x {name}" for name, spread in cell["ratio"].items()]
      rates = [f"{name} {_text(spread, ',.0f')}" for name, spread in cell["tokens_per_second"].items()]
      out.append(f"  batch {batch:>3}  {'   '.join([*ratios, *rates])}")
  for batch, spread in result["host_share"].items():
    out.append(f"host, batch {batch:>3}: {_text(spread, '.1%')} of an iteration outside of the engine's programs")
  for name, gap in result["largest_logp_difference"].items():
    out.append(f"log-probs of our samples, scored by {name}: largest difference {gap:.2g}")
  return out


def _text(spread: Mapping[str, float], form: str) -> str:
  return f"{spread['median']:{form}} [{spread['low']:{form}}-{spread['high']:{form}}]"
