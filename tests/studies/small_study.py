"""A study that takes no time: what a runner does with points is seen by what they leave behind."""

import os
import threading
import time

from ring_jax.studies.study import Point, Report, Study, Table


class Small(Study):
  name = "small"
  title = "A small study"
  claim = "Numbers can be added."

  def points(self, settings):
    first = [Point("first", seed) for seed in range(settings.seeds)]
    second = [Point("second", one.seed, needs=(one.name,)) for one in first]
    turns = [Point("turns", seed, turns=True) for seed in range(settings.seeds)]
    return [*first, *second, *turns, Point("alone", devices=3, alone=True)]

  def measure(self, point, settings, place):
    (place.folder / "tries").open("a").write("x")
    time.sleep(60 if (place.folder / "slow").exists() else 0.3)
    if point.turns:
      return _timed(place)
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


def _timed(place):
  """Works all the time, and has its turn for a part of it."""
  worked, done = [], threading.Event()

  def work():
    while not done.wait(0.01):
      worked.append(time.time())

  thread = threading.Thread(target=work)
  thread.start()
  (place.folder / "here").touch()
  if len(os.sched_getaffinity(0)) > 1:  # else they come one after the other
    while not all((place.folder.parent / f"turns_seed{seed}" / "here").exists() for seed in (0, 1)):
      time.sleep(0.01)
  place.turn.begin()
  began = time.time()
  time.sleep(1.0)
  ended = time.time()
  place.turn.end()
  time.sleep(1.0)
  done.set()
  thread.join()
  return {
    "value": 0,
    "turn": [began, ended],
    "worked": worked,
    "cores": len(os.sched_getaffinity(0)),
  }
