"""Predicts the hand-over of the weights from one half of a pod, which trains, to the other half, which generates.

  python -m ring_jax.launch.transfer --config=configs/pods/ring_1t_v5p.py --topology=v5p:4x8x8
  python -m ring_jax.launch.transfer --config=configs/pods/ring_1t_v5p.py --topology='2*v5p:4x4x8' --config.rollout.dtype=fp8

The exact plan of the transfer, for devices that are not here: bytes by device, and from them and the chip's links the
time at best and what limits it.  Of one slice the halves are joined by the links of its torus, of two slices by the
data-centre network.  Nothing is run; docs/transfer.md says what is not in the number.
"""

import json

from absl import flags

from configs.schema import RunConfig
from ring_jax.compiled import handover
from ring_jax.launch import app
from sharding.topology import Topology

FLAGS = flags.FLAGS


def define_flags() -> None:
  flags.DEFINE_string("topology", None, "Twice the devices of the config's meshes, such as v5p:4x8x8.", required=True)
  flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(config: RunConfig) -> None:
  found = handover.predicted(config, Topology.parse(FLAGS.topology))
  print(json.dumps(found) if FLAGS.json else handover.text(found))


if __name__ == "__main__":
  define_flags()
  app.run(main, config_flag=True)
