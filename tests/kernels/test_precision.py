"""float32 is multiplied in float32, in forward and backward passes, on every platform; nothing is asked of bfloat16."""

import re

import jax
import jax.numpy as jnp
import pytest

from kernels.attention import packed_attention
from kernels.grouped_matmul import grouped_matmul
from parity import cases
from ring_jax.model import abstract_params, forward
from rollout.sampling import SamplingParams, sample

HIGHEST = "precision = [HIGHEST, HIGHEST]"


def products(function, *shapes):
  """What the program says of each of its products, when it is lowered for a GPU."""
  text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
  return re.findall(r"stablehlo\.dot_general .*", text)


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def attention_loss(q, k, v, segments):
  return packed_attention(q, k, v, segments, implementation="xla_blocked").astype(jnp.float32).sum()


def expert_loss(x, w, sizes):
  return grouped_matmul(x, w, sizes, implementation="blocked").astype(jnp.float32).sum()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_and_their_gradients(dtype):
  attention = [shape(2, 200, heads, 16, dtype=dtype) for heads in (4, 2, 2)]
  experts = shape(64, 32, dtype=dtype), shape(4, 32, 48, dtype=dtype), shape(4, dtype=jnp.int32)
  found = products(jax.grad(attention_loss, (0, 1, 2)), *attention, shape(2, 200, dtype=jnp.int32))
  found += products(jax.grad(expert_loss, (0, 1)), *experts)
  assert len(found) > 8
  assert {HIGHEST in product for product in found} == {dtype == jnp.float32}


def test_model_and_its_gradient():
  config = cases.QUICK[2].config

  def loss(params, tokens):
    return forward(config, params, tokens).hidden_BxTxD.sum()

  found = products(jax.grad(loss), abstract_params(config), shape(2, 160, dtype=jnp.int32))
  assert len(found) > 20 and all(HIGHEST in product for product in found)


def test_sampled_logits():
  params = SamplingParams(shape(3), shape(3), shape(3, dtype=jnp.int32), shape(3, dtype=jnp.uint32))
  ids = shape(3, dtype=jnp.uint32), shape(3, dtype=jnp.int32)
  found = products(sample, shape(3, 16), shape(16, 40), shape(40, dtype=jnp.bool_), params, *ids)
  assert found and all(HIGHEST in product for product in found)
