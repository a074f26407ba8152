"""Ring-mini-2.0 on 4 chips of TPU v5p (v5p-8): --topology=v5p:2x2x1.

  python -m ring_jax.launch.train --config=configs/pods/ring_mini_v5p.py --workdir=SHARED --config.init=DIR \
    --config.tokenizer.path=DIR
"""

from configs import ring_mini
from configs.pods import on_pod
from configs.schema import RunConfig

TOPOLOGY = "v5p:2x2x1"


def get_config() -> RunConfig:
  return on_pod(ring_mini.get_config(), fsdp=1, expert=4, slots=128)
