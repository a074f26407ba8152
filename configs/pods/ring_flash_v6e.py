"""Ring-flash-2.0 on 256 chips of TPU v6e: --topology=v6e:16x16.

  python -m ring_jax.launch.train --config=configs/pods/ring_flash_v6e.py --workdir=SHARED --config.init=DIR \
    --config.tokenizer.path=DIR
"""

from configs import ring_flash
from configs.pods import on_pod
from configs.schema import RunConfig

TOPOLOGY = "v6e:16x16"


def get_config() -> RunConfig:
  return on_pod(ring_flash.get_config(), fsdp=4, expert=64, slots=1024)
