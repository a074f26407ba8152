"""Run in a process with eight devices: slots, and their pages, cut over the data axis."""

import dataclasses

import jax
import numpy as np

from configs.schema import MeshConfig, ParallelConfig
from ring_jax.model import init_params
from rollout.engine import RingEngine
from rollout.worker import EngineWorker
from sharding.mesh import make_mesh
from tests.rollout import test_paged as cases


def each_device_has_pages_of_its_own():
  whole = RingEngine(
    cases.MODEL, dataclasses.replace(cases.CONFIG, page_size=0), eos_ids=cases.EOS, vocab_mask_V=cases.MASK, seed=1
  )
  params = init_params(cases.MODEL, 0)
  expected = served(EngineWorker(whole), whole.load_params(params))
  layout = MeshConfig(data=2, fsdp=2, tensor=2)
  config = dataclasses.replace(cases.CONFIG, parallel=ParallelConfig(layout), pages=36)
  mesh = make_mesh(layout, jax.devices())
  engine = RingEngine(cases.MODEL, config, eos_ids=cases.EOS, vocab_mask_V=cases.MASK, seed=1, mesh=mesh)
  worker = EngineWorker(engine)
  assert engine.batch_parts == 4 and engine.pages == 9
  found = served(worker, engine.load_params(params))
  for uid, (tokens, logps, _) in expected.drawn.items():
    assert found.drawn[uid][0] == tokens, uid
    np.testing.assert_allclose(found.drawn[uid][1], logps, atol=1e-5)
  assert found.reasons == expected.reasons and found.evicted > 0
  use = worker.cache_use
  assert use.in_use == 0 and use.saved > 0 and use.pages == 36


def served(worker, stored):
  worker.begin(stored, 0, [])
  return cases.Requests(worker, cases.JOBS).run()
