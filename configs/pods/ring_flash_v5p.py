"""Ring-flash-2.0 on 32 chips of TPU v5p (v5p-64): --topology=v5p:2x4x4.

  python -m ring_jax.launch.train --config=configs/pods/ring_flash_v5p.py --workdir=SHARED --config.init=DIR \
    --config.tokenizer.path=DIR
"""

from configs import ring_flash
from configs.pods import on_pod
from configs.schema import RunConfig

TOPOLOGY = "v5p:2x4x4"


def get_config() -> RunConfig:
  return on_pod(ring_flash.get_config(), fsdp=1, expert=32, slots=512)
