"""Ring-mini-2.0 on 16 chips of TPU v5e: --topology=v5e:4x4.

  python -m ring_jax.launch.train --config=configs/pods/ring_mini_v5e.py --workdir=SHARED --config.init=DIR \
    --config.tokenizer.path=DIR
"""

from configs import ring_mini
from configs.pods import on_pod
from configs.schema import RunConfig

TOPOLOGY = "v5e:4x4"


def get_config() -> RunConfig:
  return on_pod(ring_mini.get_config(), fsdp=1, expert=16, slots=64, small=True)
