"""Shows what every slot of a run did and when.

    python -m rollout.timeline --workdir=runs/ring_tiny --iteration=7 --out=timeline.png
    python -m rollout.timeline --workdir=runs/ring_tiny --trace=slots.json    # open it in ui.perfetto.dev

The picture shows one iteration, or several (--iteration=7:9); the last one that has ended if none is named.  The trace has
the whole run: the phases of its trace.json, and below them a track for every slot.  --events takes an event log from elsewhere.
"""

import json
import pathlib

from absl import flags

from configs.schema import ConfigError
from ring_jax.launch import app
from ring_jax.train.report import trace
from ring_jax.train.workdir import write_atomic
from rollout import events
from rollout.timeline import perfetto
from rollout.timeline.spans import Iteration, Timeline, build

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "Of a run, finished or not.")
  flags.DEFINE_string("events", None, "An event log, instead of a run's.")
  flags.DEFINE_string("iteration", None, "Which to draw, N or FIRST:LAST; default: the last one that has ended.")
  flags.DEFINE_string("out", None, "The picture to write, a PNG.")
  flags.DEFINE_string("trace", None, "The trace to write, for Perfetto.")
  flags.DEFINE_string("title", "Slots over time", "Of the picture.")


def chosen(timeline: Timeline, text: str | None) -> list[Iteration]:
  """The iterations that --iteration names."""
  there = {one.number: one for one in timeline.iterations}
  if not there:
    raise ConfigError("the event log has no iteration yet")
  if text is None:
    ended = [one for one in timeline.iterations if one.end is not None]
    return (ended or timeline.iterations)[-1:]
  first, _, last = text.partition(":")
  try:
    numbers = range(int(first), int(last or first) + 1)
  except ValueError:
    raise ConfigError(f"--iteration={text}: must be N or FIRST:LAST") from None
  if not numbers or any(number not in there for number in numbers):
    raise ConfigError(f"--iteration={text}: the event log has iterations {min(there)} to {max(there)}")
  return [there[number] for number in numbers]


def main() -> None:
  if bool(FLAGS.workdir) == bool(FLAGS.events):
    raise ConfigError("--workdir and --events: give one, a run or an event log")
  if not (FLAGS.out or FLAGS.trace):
    raise ConfigError("--out and --trace are missing: nothing to write")
  workdir = pathlib.Path(FLAGS.workdir).expanduser() if FLAGS.workdir else None
  timeline = build(events.read(workdir / "events.jsonl" if workdir else pathlib.Path(FLAGS.events)))
  if FLAGS.out:
    from rollout.timeline import picture  # matplotlib takes a second to import

    write_atomic(pathlib.Path(FLAGS.out), picture.draw(timeline, chosen(timeline, FLAGS.iteration), FLAGS.title))
  if FLAGS.trace:
    phases = trace.read(workdir / "trace.json") if workdir else []
    lines = ",\n".join(json.dumps(event) for event in [*phases, *perfetto.tracks(timeline)])
    write_atomic(pathlib.Path(FLAGS.trace), f"[\n{lines}\n]\n")


if __name__ == "__main__":
  define_flags()
  app.run(main)
