"""Ring-1T on 64 chips of TPU7x, two devices each: --topology=tpu7x:4x4x4.

  python -m ring_jax.launch.train --config=configs/pods/ring_1t_tpu7x.py --workdir=SHARED --config.init=DIR \
    --config.tokenizer.path=DIR
"""

from configs import ring_1t
from configs.pods import on_pod
from configs.schema import RunConfig

TOPOLOGY = "tpu7x:4x4x4"


def get_config() -> RunConfig:
  return on_pod(ring_1t.get_config(), fsdp=2, expert=64, slots=128, small=True, whole=False)
