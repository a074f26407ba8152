"""Finds rollouts of a run: to read them, to write them to a file, to score them again.

    python -m ring_jax.launch.rollouts --workdir=runs/ring_tiny --step=100:120 --reward=1 --limit=5
    python -m ring_jax.launch.rollouts --workdir=runs/ring_tiny --finish_reason=length --out=cut.jsonl
    python -m ring_jax.launch.rollouts --workdir=runs/ring_tiny --rescore --json

A number, or LOW:HIGH with both ends included, of which one may be left out: --length=512: is all that are as long.  Texts are
as the run's tokenizer decoded them.  --rescore asks the run's verifiers again, and says which rewards are not the stored ones.
"""

import itertools
import json
import pathlib

from absl import flags

from configs import loading
from configs.schema import ConfigError
from ring_jax.launch import app
from ring_jax.records import FinishReason
from ring_jax.train import stored
from ring_jax.train.workdir import write_atomic

FLAGS = flags.FLAGS
_RANGES = {
  "step": "Of the run, as in the names of the files.",
  "problem": "Index of the problem in training order.",
  "group": "Of siblings: the answers to one prompt.",
  "uid": "Of the rollout.",
  "reward": "As stored.",
  "length": "Tokens of the answer.",
}


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "Of a run, finished or not.", required=True)
  for name, meaning in _RANGES.items():
    flags.DEFINE_string(name, None, f"{meaning} N or LOW:HIGH.")
  flags.DEFINE_enum("finish_reason", None, [reason.value for reason in FinishReason], "How the answer ended.")
  flags.DEFINE_integer("limit", None, "How many at most, the first ones; default: all.")
  flags.DEFINE_string("out", None, "A JSONL file to write them to, instead of printing them.")
  flags.DEFINE_bool("rescore", False, "Score them again, instead of printing them.")
  flags.DEFINE_bool("json", False, "Print one JSON object.")


def main() -> None:
  ranges = {name: stored.Range.parse(name, FLAGS[name].value) for name in _RANGES if FLAGS[name].value is not None}
  reason = FLAGS.finish_reason and FinishReason(FLAGS.finish_reason)
  if FLAGS.limit is not None and FLAGS.limit < 1:
    raise ConfigError(f"--limit={FLAGS.limit}: must be at least 1")
  workdir = pathlib.Path(FLAGS.workdir).expanduser()
  config = loading.of_run(workdir, f"--workdir={workdir}")
  query = stored.Query(finish_reason=reason, **ranges)
  found = list(itertools.islice(stored.find(workdir, query), FLAGS.limit))
  again = stored.rescore(workdir, config, found) if FLAGS.rescore else None
  if FLAGS.out:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in found)
    write_atomic(pathlib.Path(FLAGS.out), "".join(lines))
  shown = not (FLAGS.out or FLAGS.rescore)
  if FLAGS.json:
    summary = {"count": len(found)} | ({"rollouts": found} if shown else {})
    print(json.dumps(summary | ({"rescored": vars(again)} if again else {})))
    return
  if shown:
    print("\n".join(map(stored.text, found)))
  print(f"{len(found)} rollouts" + (f" in {FLAGS.out}" if FLAGS.out else ""))
  if again is not None:
    print("\n".join(again.lines()))


if __name__ == "__main__":
  define_flags()
  app.run(main)
