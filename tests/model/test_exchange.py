"""The four ways in which tokens meet experts: one MoE layer on eight devices against one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.ring_tiny import get_config
from configs.schema import MeshConfig, ParallelConfig
from ring_jax.model.moe import MoE
from sharding import rules
from sharding.mesh import make_mesh

MODEL = dataclasses.replace(get_config().model, hidden_size=16, moe_intermediate_size=8, num_experts=16, n_group=1)
B, T = 8, 12
CASES = {
  # A buffer that holds a balanced load; one so small that most rows take further rounds; tokens in uneven chunks.
  "ring": ParallelConfig(MeshConfig(data=2, expert=4), expert_parallel="ring"),
  "ring, small buffers": ParallelConfig(MeshConfig(expert=8), expert_parallel="ring", expert_buffer=0.1),
  "all_to_all": ParallelConfig(MeshConfig(fsdp=2, expert=4), expert_parallel="all_to_all"),
  "all_to_all, small buffers": ParallelConfig(MeshConfig(expert=8), expert_parallel="all_to_all", expert_buffer=0.1),
  "ragged": ParallelConfig(MeshConfig(expert=4, tensor=2), expert_parallel="ragged_all_to_all", expert_buffer=4.0),
  "ragged, small buffers": ParallelConfig(MeshConfig(expert=8), expert_parallel="ragged_all_to_all", expert_buffer=0.3),
  "chunks": ParallelConfig(MeshConfig(fsdp=2, expert=2, tensor=2), expert_parallel="all_to_all", moe_chunk=5),
}


@functools.cache
def program(parallel):
  """The layer's value and gradients; compiled once for all inputs."""
  config = dataclasses.replace(MODEL, parallel=parallel)
  graph, abstract = nnx.split(nnx.eval_shape(lambda: MoE(config, nnx.Rngs(params=3))))

  def run(weights, x_BxTxD, grad_BxTxD, valid_BxT):
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, weights)
    x, grad, valid = (
      rules.reshard(a, config.parallel.rules, "batch", *[None] * (a.ndim - 1)) for a in (x_BxTxD, grad_BxTxD, valid_BxT)
    )
    out_BxTxD, routed = nnx.merge(graph, state)(x, valid)
    return jnp.sum(out_BxTxD * grad), (out_BxTxD, routed.counts_E)

  mesh = make_mesh(parallel.mesh) if parallel.mesh.num_devices > 1 else None
  return rules.Program(mesh, jax.value_and_grad(run, argnums=(0, 1), has_aux=True))


def layer(parallel, skew, valid_share):
  """Output, gradients and counts of one layer whose router prefers the first experts by `skew`."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  weights = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(MoE(MODEL, nnx.Rngs(params=3)))))
  weights["router"]["bias"] = (normal(16) * 0.1 - skew * np.arange(16)).astype(np.float32)
  x_BxTxD, grad_BxTxD, valid_BxT = 2 * normal(B, T, 16), normal(B, T, 16), rng.random((B, T)) < valid_share
  (_, (out, counts)), grads = program(parallel)(weights, x_BxTxD, grad_BxTxD, valid_BxT)
  return jax.device_get((out, grads)), np.asarray(counts)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("skew, valid_share", [(0.0, 0.9), (1.0, 1.0)], ids=["even", "all to the first experts"])
def test_every_way_is_the_local_one(name, skew, valid_share):
  parallel = CASES[name]
  got, counts = layer(parallel, skew, valid_share)
  want, expected = layer(ParallelConfig(), skew, valid_share)
  np.testing.assert_array_equal(counts, expected)
  assert skew == 0 or counts[:2].sum() == counts.sum() == 2 * B * T  # top-2: one device gets every row
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * max(np.abs(theirs).max(), 1e-3))


def test_a_device_without_any_token():
  parallel = CASES["all_to_all"]
  got, counts = layer(parallel, 0.0, 0.0)
  assert counts.sum() == 0 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
