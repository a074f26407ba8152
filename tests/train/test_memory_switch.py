"""Memory that changes hands between the run's own programs: nothing stays behind, to the byte."""

import dataclasses
import gc

import jax
import numpy as np
import pytest

from configs.ring_tiny import get_config
from ring_jax.model import init_params
from ring_jax.train.optimizer import make_optimizer
from ring_jax.train.programs import Programs
from rollout.engine import Insertion, RingEngine
from sharding.memory import Ledger, LedgerError, Place, free, to_device, to_host

BASE = get_config()
MODEL = dataclasses.replace(BASE.model, vocab_size=48, hidden_size=32, num_hidden_layers=1, first_k_dense_replace=0)
CONFIG = dataclasses.replace(BASE, model=MODEL)
MASK = np.ones(48, bool)
ALWAYS = dict.fromkeys(("rollout", "training"), Place.DEVICE)


def test_rollouts_and_training_take_turns():
  gc.collect()
  programs = Programs(CONFIG, MASK, {"rl": make_optimizer(CONFIG.rl.optimizer, 10)})
  engine = RingEngine(
    MODEL, dataclasses.replace(CONFIG.rollout, slots=8, prefill_batch=2, max_tokens=12), eos_ids=[0],
    vocab_mask_V=MASK, seed=0,
  )  # fmt: skip
  params = init_params(MODEL, 0)
  state, stored = programs.init_optimizer(params, "rl"), engine.load_params(params)
  ledger = Ledger(slack_bytes=512)
  ledger.register("actor", "parameters", params, ALWAYS)
  ledger.register("actor", "optimizer", state, {"rollout": Place.HOST, "training": Place.DEVICE})
  ledger.register("rollout", "weights", stored, ALWAYS)
  ledger.register(
    "rollout", "slots", engine.abstract_decode_state(), {"rollout": Place.DEVICE, "training": Place.FREED}
  )
  ledger.baseline()
  for _ in range(2):
    state = to_host(state)
    ledger.hold("actor", "optimizer", state)
    slots = engine.insert_batch(
      engine.prefill_batch(stored, [[5, 6, 7], [8]]), engine.init_decode_state(), [Insertion(0, 3, 1, 4)]
    )
    slots, drawn = engine.decode(stored, slots, 4)
    ledger.hold("rollout", "slots", slots)
    assert np.isfinite(jax.device_get(drawn).logp_NxB).all()
    free(drawn)
    ledger.check("rollout")

    free(slots)
    state = to_device(state)
    grads = jax.tree.map(lambda leaf: leaf * 0.01, params)
    params, state, _ = programs.apply(params, state, grads, "rl")
    ledger.hold("actor", "parameters", params)
    ledger.hold("actor", "optimizer", state)
    with pytest.raises(LedgerError, match=r"belong to nobody .*\nrole"):  # the gradients are there still
      ledger.check("training")
    free(grads)
    ledger.check("training")
    free(stored)
    stored = engine.load_params(params)
    ledger.hold("rollout", "weights", stored)
