"""The engine against teacher forcing: log-probs, slots, shared prefills, stops, resume, and JetStream's own methods."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ring_tiny import get_config
from configs.schema import RolloutDtype
from ring_jax import model as ring_model
from rollout.engine import Insertion, RingEngine, Sampling
from rollout.jetstream_compat import engine_api

MODEL = get_config().model
CONFIG = dataclasses.replace(get_config().rollout, slots=16, pool=16, max_tokens=12, prefill_batch=4)
EOS, NEVER = 7, (5, *range(300, 320))
MASK = np.isin(np.arange(MODEL.vocab_size), NEVER, invert=True)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(8, 300, size).tolist() for size in (3, 11, 20, 1)]


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(lambda leaf: leaf * 1.7, ring_model.init_params(MODEL, 0))


@functools.cache
def engine(**changes):
  return RingEngine(MODEL, dataclasses.replace(CONFIG, **changes), eos_ids=[EOS], vocab_mask_V=MASK, seed=3)


def run(engine, stored, insertions, prompts=PROMPTS, steps=(4, 4, 4), state=None):
  """{uid: (tokens, logps)} of what the steps drew."""
  state = engine.init_decode_state() if state is None else state
  state = engine.insert_batch(engine.prefill_batch(stored, prompts), state, insertions)
  drawn = {insertion.uid: ([], []) for insertion in insertions}
  for count in steps:
    state, out = engine.decode(stored, state, count)
    out = jax.device_get(out)
    for insertion in insertions:
      valid = out.valid_NxB[:, insertion.slot]
      drawn[insertion.uid][0].extend(out.token_NxB[valid, insertion.slot].tolist())
      drawn[insertion.uid][1].extend(out.logp_NxB[valid, insertion.slot].tolist())
  return drawn


def teacher_forced(params, prompt, tokens):
  row = np.asarray([[*prompt, *tokens]], np.int32)
  padded = np.pad(row, ((0, 0), (0, 32 - row.shape[1])))
  hidden = jax.jit(functools.partial(ring_model.forward, MODEL))(params, padded).hidden_BxTxD[0]
  logits = np.asarray(hidden @ params["lm_head"]["kernel"], np.float64)
  logits[:, ~MASK] = -np.inf
  logps = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
  logps -= logits.max(-1, keepdims=True)
  at = len(prompt) - 1 + np.arange(len(tokens))
  return logps[at, tokens]


GROUPS = [Insertion(row=i // 4, slot=(5 * i) % 16, uid=100 + i, max_tokens=12) for i in range(16)]


@pytest.fixture(scope="module")
def drawn(params):
  return run(engine(), engine().load_params(params), GROUPS)


def test_logps_are_those_of_the_trainer(params, drawn):
  worst = 0.0
  for insertion in GROUPS:
    tokens, logps = drawn[insertion.uid]
    assert 0 < len(tokens) <= 12 and not set(tokens) & set(NEVER)
    assert EOS not in tokens[:-1] and (len(tokens) == 12 or tokens[-1] == EOS)
    worst = max(worst, np.abs(np.array(logps) - teacher_forced(params, PROMPTS[insertion.row], tokens)).max())
  assert worst <= 1e-5
  assert len({tuple(tokens) for tokens, _ in drawn.values()}) > 12, "the members of a group must differ"


def test_samples_do_not_depend_on_slot_batch_or_dispatch(params, drawn):
  stored = engine().load_params(params)
  few = [dataclasses.replace(GROUPS[i], slot=slot) for slot, i in enumerate((9, 2, 14))]
  again = run(engine(), stored, few, steps=(1, 8, 3))
  for insertion in few:
    assert again[insertion.uid][0] == drawn[insertion.uid][0]
    np.testing.assert_allclose(again[insertion.uid][1], drawn[insertion.uid][1], atol=1e-5)


def test_a_rollout_cut_and_prefilled_again_goes_on_as_if_nothing_had_happened(params, drawn):
  stored = engine().load_params(params)
  long = [insertion for insertion in GROUPS if len(drawn[insertion.uid][0]) > 5][:4]
  cut = [[*PROMPTS[insertion.row], *drawn[insertion.uid][0][:5]] for insertion in long]
  resumed = [dataclasses.replace(insertion, row=row, max_tokens=7) for row, insertion in enumerate(long)]
  again = run(engine(), stored, resumed, prompts=cut)
  for insertion in long:
    assert again[insertion.uid][0] == drawn[insertion.uid][0][5:]


def test_slots_have_sampling_of_their_own(params):
  stored = engine().load_params(params)
  how = [Sampling(1.0, 1.0, 1, 3), Sampling(1.0, 1.0, 1, 4), Sampling(1.0, 1.0, 0, 3), Sampling(1.0, 1.0, 0, 4)]
  inserted = [Insertion(0, slot, 50, 6, sampling) for slot, sampling in enumerate(how)]
  state = engine().insert_batch(engine().prefill_batch(stored, PROMPTS), engine().init_decode_state(), inserted)
  _, out = engine().decode(stored, state, 6)
  greedy_a, greedy_b, seed_3, seed_4 = np.asarray(out.token_NxB)[:, :4].T
  assert (greedy_a == greedy_b).all() and (seed_3 != seed_4).any()
  assert np.abs(np.asarray(out.logp_NxB)[:, :2][np.asarray(out.valid_NxB)[:, :2]]).max() == 0.0, "top-k 1 is certain"


@pytest.mark.parametrize("dtype", [RolloutDtype.BFLOAT16, RolloutDtype.INT8, RolloutDtype.INT4, RolloutDtype.FP8])
def test_every_weight_dtype_decodes_and_differs_from_the_trainer(params, dtype):
  quantised = engine(dtype=dtype)
  drawn = run(quantised, quantised.load_params(params), GROUPS[:4])
  error = [
    np.abs(np.array(logps) - teacher_forced(params, PROMPTS[0], tokens)).mean() for tokens, logps in drawn.values()
  ]
  assert 1e-5 < np.mean(error) < 10


def test_bfloat16_steps_by_bits_are_steps_by_values(params):
  """A CPU's steps go over the bits of the cache; the state between dispatches does not show it."""
  by_bits, by_values = (
    RingEngine(MODEL, dataclasses.replace(CONFIG, dtype=RolloutDtype.BFLOAT16), eos_ids=[], vocab_mask_V=MASK, seed=3)
    for _ in range(2)
  )
  by_values._platform = "gpu"  # what a program is compiled for is not what it is traced for: it runs here all the same
  drawn = []
  for one in (by_bits, by_values):
    stored = one.load_params(params)
    state = one.insert_batch(one.prefill_batch(stored, PROMPTS), one.init_decode_state(), GROUPS)
    state, first = one.decode(stored, state, 1)
    state, second = one.decode(stored, state, 1)
    assert state.cache.k_LxBxKxdxS.dtype == state.cache.v_LxBxKxSxd.dtype == jnp.bfloat16
    drawn.append(jax.device_get((first, second)))
  same = np.ones(len(GROUPS), bool)
  for bits, values in zip(*drawn, strict=True):
    same &= (bits.token_NxB == values.token_NxB)[0]
    # A token whose rounding chose another expert differs by more.
    assert np.quantile(np.abs(bits.logp_NxB - values.logp_NxB)[0, same], 0.75) <= 0.1
  assert same.sum() >= 10


def test_released_slots_are_silent_and_the_others_go_on(params):
  stored = engine().load_params(params)
  state = engine().insert_batch(engine().prefill_batch(stored, PROMPTS), engine().init_decode_state(), GROUPS)
  state = engine().release(state, running=[0, 3])
  _, out = engine().decode(stored, state, 2)
  assert set(np.flatnonzero(np.asarray(out.valid_NxB)[0])) == {0, 3}


def test_prompts_that_do_not_fit_are_refused(params):
  stored = engine().load_params(params)
  for prompts, message in (([[]], "from 1 to 32"), ([[1] * 33], "from 1 to 32"), ([[1]] * 5, "from 1 to 4")):
    with pytest.raises(ValueError, match=message):
      engine().prefill_batch(stored, prompts)


def test_jetstream_engine_api(params):
  """Prefill, insert and generate as JetStream's orchestrator calls them: padded tokens, one slot, one step."""
  subject = engine()
  assert isinstance(subject, engine_api.Engine) and subject.max_concurrent_decodes == 16
  stored = subject.load_params(params)
  padded = jnp.asarray(PROMPTS[1] + [0] * 5)
  prefix = subject.prefill(params=stored, padded_tokens=padded, true_length=len(PROMPTS[1]))
  state = subject.insert(prefix, subject.init_decode_state(), slot=6)
  tokens = []
  for step in range(1, 5):
    state, result = subject.generate(stored, state)
    data = result.convert_to_numpy().get_result_at_slot(6)
    assert data.valid[0, 0] == 1 and data.lengths[0] == step
    tokens.append(int(data.tokens[0, 0]))
  batch = run(subject, stored, [Insertion(1, 2, 6, 4)], steps=(4,))
  assert tokens == batch[6][0]
