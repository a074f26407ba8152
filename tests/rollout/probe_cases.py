"""Run in a process with four devices: the trainer on two of them, the engine on all, on two others, or in bfloat16."""

import dataclasses
import re

import jax
import numpy as np

from configs.schema import MeshConfig, ParallelConfig, RolloutDtype
from ring_jax.model import init_params
from rollout.engine import RingEngine
from rollout.probe import EngineProbe
from sharding.mesh import make_mesh
from sharding.transfer import TransferError
from tests.train import small_run


def wrong_weights_are_named():
  base, devices = small_run.get_config(), jax.devices()
  for dtype, trained, served in (
    (RolloutDtype.FLOAT32, range(2), range(2, 4)),
    (RolloutDtype.INT8, range(4), range(4)),
    (RolloutDtype.BFLOAT16, range(2), range(2, 4)),
  ):
    size = len(served)
    model = dataclasses.replace(base.model, parallel=ParallelConfig(MeshConfig(fsdp=len(trained))))
    rollout = dataclasses.replace(
      base.rollout, dtype=dtype, parallel=ParallelConfig(MeshConfig(data=size // 2, tensor=2))
    )
    mesh = make_mesh(model.parallel.mesh, [devices[i] for i in trained])
    engine = RingEngine(
      model, rollout, eos_ids=(1,), vocab_mask_V=np.ones(model.vocab_size, bool), seed=0,
      mesh=make_mesh(rollout.parallel.mesh, [devices[i] for i in served]),
    )  # fmt: skip
    probe = EngineProbe(model, mesh, engine)
    params = init_params(model, 0, mesh)
    stored = engine.load_params(params, 3)
    probe(params, stored, 3)
    newer = init_params(model, 1, mesh)
    try:
      probe(newer, stored, 4)
      raise AssertionError(f"{dtype}: weights of another step were not noticed")
    except TransferError as error:
      assert "version 4" in str(error) and "and the probe differs by" in str(error), error
    if dtype is RolloutDtype.FLOAT32:
      stored["moe_layers"]["attention"]["wo"] = -stored["moe_layers"]["attention"]["wo"]
      try:
        probe(params, stored, 5)
        raise AssertionError("a tensor with the wrong sign was not noticed")
      except TransferError as error:
        assert re.search(r"moe_layers\.attention\.wo.* elements differ", str(error)), error
        assert "mlp" not in str(error) and "embed" not in str(error), error
