"""Ring-1T on 128 chips of TPU v5p: --topology=v5p:4x4x8.

  python -m ring_jax.launch.train --config=configs/pods/ring_1t_v5p.py --workdir=SHARED --config.init=DIR \
    --config.tokenizer.path=DIR
"""

from configs import ring_1t
from configs.pods import on_pod
from configs.schema import RunConfig

TOPOLOGY = "v5p:4x4x8"


def get_config() -> RunConfig:
  return on_pod(ring_1t.get_config(), fsdp=2, expert=64, slots=128, small=True)
