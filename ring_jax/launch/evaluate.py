"""Measures a checkpoint: mean score of several answers to each held-out problem.

    python -m ring_jax.launch.evaluate --checkpoint=runs/ring_tiny --samples=8 --json
    python -m ring_jax.launch.evaluate --checkpoint=Ring-mini-2.0 --task=gcd --samples=4 --max_tokens=2048

--task names any Reasoning Gym task; a run's own tasks are the default, and are phrased as the run phrased them.  The
problems and the randomness are fixed, so the number is a function of the weights.
"""

import json

from absl import flags

from ring_jax.launch import app
from ring_jax.train.measure import Settings, as_json, measure

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string("checkpoint", None, "Hugging Face folder, Orbax step folder or workdir.", required=True)
  flags.DEFINE_string("task", None, "A Reasoning Gym task; default: those of the checkpoint's run.")
  flags.DEFINE_integer("samples", 8, "Answers a problem.")
  flags.DEFINE_integer("problems", 512, "Held-out problems.")
  flags.DEFINE_integer("slots", None, "Answers decoded at once; default: as in the run.")
  flags.DEFINE_integer("max_prompt_tokens", None, "Longer prompts are left out; default: as in the run.")
  flags.DEFINE_integer("max_tokens", None, "Of an answer; default: as in the run.")
  flags.DEFINE_float("temperature", 1.0, "Of the samples.")
  flags.DEFINE_float("top_p", 1.0, "Of the samples; 1: off.")
  flags.DEFINE_integer("top_k", 0, "Of the samples; 0: off.")
  flags.DEFINE_bool("json", False, "Print one JSON object.")


def main() -> None:
  names = ("task", "samples", "problems", "slots", "max_prompt_tokens", "max_tokens", "temperature", "top_p", "top_k")
  settings = Settings(**{name: getattr(FLAGS, name) for name in names})
  opened, result = measure(FLAGS.checkpoint, settings)
  if FLAGS.json:
    print(json.dumps(as_json(opened, settings, result)))
    return
  for example in result.examples:
    print(f"{'right' if example['reward'] >= 1 else 'wrong'}  {example['prompt']} {example['answer']!r}")
  print(f"accuracy {result.accuracy:.4f}  pass@{result.samples} {result.pass_at_k:.4f}  ({result.problems} problems)")


if __name__ == "__main__":
  define_flags()
  app.run(main)
