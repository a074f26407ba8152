"""Router replay (R3) as the alternative to IcePop, and together with it: the engine's experts in the trainer.

The setting is that of stability.py; an arm ending in _r3 has `rollout.router_replay` on.  What replay takes away is the part
of the discrepancy that comes from other experts; what rounding does to the weights themselves stays.
"""

import dataclasses
from collections.abc import Mapping

from ring_jax.studies import comparing
from ring_jax.studies.stability import config_of, with_objective
from ring_jax.studies.statistics import interval
from ring_jax.studies.study import Figure, Place, Point, Report, Result, Results, Settings, Study
from ring_jax.studies.training import COLD, cold_start, from_cold_starts, train

_R3 = "_r3"
ARMS: Mapping[str, str] = {
  "icepop": "IcePop",
  "icepop_r3": "IcePop and R3",
  "grpo_infer_old": "GRPO, old = engine",
  "grpo_infer_old_r3": "GRPO, old = engine, R3",
}


class RouterReplay(Study):
  name = "router_replay"
  title = "Router replay beside IcePop"
  claim = (
    "R3 (arXiv 2510.11370): replaying the engine's experts in the trainer removes most of the discrepancy of a mixture of experts"
    " and prevents the collapse. Ring-1T does without, and masks."
  )

  def points(self, settings: Settings) -> list[Point]:
    return from_cold_starts(settings, ("icepop", "icepop_r3") if settings.quick else ARMS)

  def measure(self, point: Point, settings: Settings, place: Place) -> Result:
    config = config_of(settings)
    if point.arm == COLD:
      return cold_start(config, point.seed, place)
    replay = point.arm.endswith(_R3)
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, router_replay=replay))
    return train(with_objective(config, point.arm.removesuffix(_R3)), point.seed, place, comparing.METRICS)

  def report(self, settings: Settings, results: Results) -> Report:
    labels = comparing.with_results(results, ARMS)
    return Report(
      findings=[*_less(results, labels), *comparing.findings(results, labels)],
      tables=[comparing.accuracy_table(results, labels), comparing.mismatch_table(results, labels)],
      figures=[
        Figure("curves", "Router replay and IcePop: mean of the seeds, band of 95%", comparing.panels(results, labels))
      ],
      not_shown=[
        "A mismatch that comes from kernels alone, where other experts are nearly all of it: int4 weights differ in every layer"
        " whatever the experts, and that part R3 cannot take away.",
        "Large models; see stability.",
      ],
    )


def _less(results: Results, labels: comparing.Labels) -> list[str]:
  """How much of the discrepancy replay takes away at the first steps, where both arms have the same weights."""
  if not {"icepop", "icepop_r3"} <= set(labels):
    return []
  first = [
    [comparing.first_steps(one["series"]["mismatch/delta_mean"]) for one in results.of(arm)]
    for arm in ("icepop", "icepop_r3")
  ]
  shares = interval([after / before - 1 for before, after in zip(*first, strict=True)])
  return [f"R3 changes the mean |Δlogp| of the first {comparing.WINDOW} steps by {shares.format(0, 100, '%')}."]
