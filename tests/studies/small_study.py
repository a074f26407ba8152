"""A study that takes no time: what a runner does with points is seen by what they leave behind."""

import os
import time

from ring_jax.studies.study import Point, Report, Study, Table


class Small(Study):
  name = "small"
  title = "A small study"
  claim = "Numbers can be added."

  def points(self, settings):
    first = [Point("first", seed) for seed in range(settings.seeds)]
    second = [Point("second", one.seed, needs=(one.name,)) for one in first]
    return [*first, *second, Point("alone", devices=3, alone=True)]

  def measure(self, point, settings, place):
    (place.folder / "tries").open("a").write("x")
    time.sleep(60 if (place.folder / "slow").exists() else 0.3)
    if (place.folder / "broken").exists():
      raise RuntimeError("this point was told to fail")
    earlier = [len((place.of(name) / "result.json").read_text()) for name in point.needs]
    return {
      "value": point.seed, "earlier": earlier, "cores": len(os.sched_getaffinity(0)),
      "devices": os.environ["JAX_NUM_CPU_DEVICES"], "time": time.time(),
    }  # fmt: skip

  def report(self, settings, results):
    rows = [[arm, str(sum(one["value"] for one in results.of(arm)))] for arm in results.arms()]
    return Report(["They can."], [Table("Sums", ["arm", "a | b"], rows, "A note.")], [], ["Subtraction."])
