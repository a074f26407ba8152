"""A comparison of schedules: one JSON object, or a table to read."""

from collections.abc import Sequence
from typing import Any

from rollout.simulator.lengths import Trace
from rollout.simulator.outcome import Outcome


def comparison(trace: Trace, outcome: Outcome, synchronous: Outcome, others: Sequence[Outcome]) -> dict[str, Any]:
  """Plain JSON data: what C3PO++ reached, and below `schedules` everybody, speedups over the synchronous batch."""
  schedules = {}
  for one in (outcome, synchronous, *others):
    schedules[one.schedule] = {
      "rollout_speedup": one.speedup_over(synchronous, "rollout_seconds"),
      "end_to_end_speedup": one.speedup_over(synchronous, "seconds"),
      **one.summary(trace),
    }
  tokens = sum(trace.lengths)
  described = {"rollouts": len(trace.lengths), "prompts": trace.groups, "tokens": tokens, "mean_length": trace.mean}
  return {**schedules[outcome.schedule], "trace": described, "schedules": schedules}


def lines(report: dict[str, Any]) -> list[str]:
  """The same for a person."""
  trace = report["trace"]
  header = ["", "rollout", "end to end", "utilisation", "while fed", "wasted", "lost", "staleness", "length trained"]
  rows = [header]
  for name, one in report["schedules"].items():
    bias = one["length_bias"]
    rows.append(
      [
        name,
        _time(one["rollout_seconds"], one["rollout_speedup"]),
        _time(one["end_to_end_seconds"], one["end_to_end_speedup"]),
        _percent(one["utilisation"]),
        _percent(one["utilisation_while_fed"]),
        _percent(one["tokens_wasted"] / one["tokens_generated"] if one["tokens_generated"] else None),
        str(one["rollouts_lost"]),
        f"{one['mean_staleness']:.2f}, at most {one['max_staleness']}",
        "none" if bias["mean_trained"] is None else f"{bias['mean_trained']:.0f} (distance {bias['distance']:.3f})",
      ]
    )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  table = [
    "  ".join(
      cell.ljust(width) if not index else cell.rjust(width) for index, (cell, width) in enumerate(pairs)
    ).rstrip()
    for pairs in (zip(row, widths, strict=True) for row in rows)
  ]
  return [
    f"{trace['rollouts']} rollouts of {trace['prompts']} prompts, {trace['mean_length']:.0f} tokens on average",
    *table,
    "times: of the whole trace, and how much faster a trained token is than in the synchronous batch;"
    " utilisation: trained tokens / (slots x steps)",
  ]


def measured_lines(found: dict[str, Any]) -> list[str]:
  """What `--measure` found (rollout/measured.py), for a person."""
  return [
    f"measured on the real engine: a trained token's rollout is {found['rollout_speedup']:.2f}x as quick as in the"
    f" synchronous batch ({', '.join(f'{turn:.2f}' for turn in found['turns'])} by turn),"
    f" {found['dispatch_speedup']:.2f}x by dispatches",
    *(
      f"  {name:<12} {one['seconds']:.3f} s, {one['prefill_seconds']:.3f} of them prefill; {one['dispatches']} dispatches,"
      f" {one['iterations']} iterations, {one['tokens_trained']} tokens trained on, {one['tokens_wasted']} wasted,"
      f" staleness at most {one['max_staleness']}"
      for name in ("c3po", "synchronous")
      for one in [found[name]]
    ),
  ]


def _time(seconds: float, speedup: float | None) -> str:
  return f"{seconds:.4g} s" + ("" if speedup is None else f" ({speedup:.2f}x)")


def _percent(share: float | None) -> str:
  return "none" if share is None else f"{share:.1%}"
