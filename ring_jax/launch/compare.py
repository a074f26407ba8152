"""Puts the curves of any runs into one picture, and their last values into a table.

    python -m ring_jax.launch.compare --runs=runs/a,runs/b --out=compared.png
    python -m ring_jax.launch.compare --runs=icepop=runs/i0+runs/i1+runs/i2,tis=runs/t0+runs/t1+runs/t2 --metrics=reward,grad_norm

NAME=DIR+DIR+... is a group of runs, as of several seeds: their mean is drawn, and the interval of 95% as a band.  Any number of
metrics.jsonl and timings.jsonl can be a metric.
"""

import json
import pathlib

from absl import flags

from configs.schema import ConfigError
from ring_jax.launch import app
from ring_jax.studies import overlay, page
from ring_jax.train.workdir import write_atomic

FLAGS = flags.FLAGS
_METRICS = [
  "reward",
  "mismatch/delta_mean",
  "policy/entropy",
  "grad_norm",
  "scheduler/length_trained_mean",
  "seconds/step",
]


def define_flags() -> None:
  flags.DEFINE_list("runs", None, "Workdirs, or groups NAME=DIR+DIR.", required=True)
  flags.DEFINE_list("metrics", _METRICS, "What to draw.")
  flags.DEFINE_enum("phase", "rl", ["sft", "rl", "reward", "rlhf"], "Steps of which phase.")
  flags.DEFINE_integer("window", 10, "Steps of the running mean; 1: none.", lower_bound=1)
  flags.DEFINE_string("out", "compared.png", "The PNG to write.")
  flags.DEFINE_bool("json", False, "Print the table as one JSON object.")


def main() -> None:
  if not FLAGS.out.endswith(".png"):
    raise ConfigError(f"--out={FLAGS.out}: must be a .png file")
  groups = overlay.read(FLAGS.runs, FLAGS.phase)
  out = pathlib.Path(FLAGS.out)
  write_atomic(out, overlay.draw(groups, FLAGS.metrics, FLAGS.window))
  table = overlay.table(groups, FLAGS.metrics, FLAGS.window)
  if FLAGS.json:
    print(json.dumps({"picture": str(out), "header": list(table.header), "rows": [list(row) for row in table.rows]}))
    return
  print("\n".join(page.markdown(table)))
  print(f"picture: {out}")


if __name__ == "__main__":
  define_flags()
  app.run(main)
