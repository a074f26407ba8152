"""The linear log-probability compiled by the real TPU compiler: memory, buffers, kernels, collectives.  Nothing runs."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.linear_logprob import Partition, linear_logprob
from sharding.hardware import CHIPS
from tests.kernels.compiled import (
  abstract,
  collectives,
  compile_for,
  devices_of,
  largest_buffer_elements,
  temp_bytes,
)
from tests.kernels.tpu_programs import H, N, V, policy_gradient

MIB = 2**20
KERNEL = 'custom_call_target="tpu_custom_call"'

fused = functools.lru_cache(policy_gradient)


@pytest.mark.tpu
def test_memory_of_the_policy_gradient():
  """4096 tokens at the real vocabulary: no array of tokens times vocabulary, nor anything a sixteenth of it."""
  program = fused("v5p")
  text = program.as_text()
  assert temp_bytes(program) <= 24 * MIB
  assert largest_buffer_elements(text, excluding=((H, V),)) < N * V / 16
  assert text.count(KERNEL) == 2  # the forward sweep with the expected weight, and dweight: no third one


@pytest.mark.tpu_full
def test_memory_is_a_hundredth_of_the_unfused_loss():
  unfused = policy_gradient("v5p", implementation="reference")
  assert largest_buffer_elements(unfused.as_text(), excluding=((H, V),)) >= N * V
  assert temp_bytes(unfused) >= 100 * temp_bytes(fused("v5p"))


@pytest.mark.tpu_full
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("hidden", [2048, 4096, 8192])
def test_every_chip_and_width(chip, hidden):
  """Ring-mini, Ring-flash, Ring-1T: temporary memory is what is kept of each token, [N, H] in bfloat16."""
  program = policy_gradient(chip, hidden=hidden)
  assert temp_bytes(program) <= 2 * N * hidden + 8 * MIB
  assert program.as_text().count(KERNEL) == 2


@pytest.mark.tpu_full
def test_a_long_batch_fits_where_the_unfused_loss_does_not():
  assert temp_bytes(policy_gradient("v5e", tokens=32_768)) <= 256 * MIB
  with pytest.raises(Exception, match=r"(?i)exceed.*hbm|ran out of memory|hbm.*exceed"):
    policy_gradient("v5e", tokens=32_768, implementation="reference")


@pytest.mark.tpu
@pytest.mark.parametrize("shape", [(21, 64, 320), (600, 256, 1000)])
def test_odd_shapes_compile(shape):
  """The toy model's, and a vocabulary and tokens that fill no tile."""
  assert fused("v5e", *shape).as_text().count(KERNEL) == 2


@pytest.mark.tpu_full
@pytest.mark.parametrize("chip", CHIPS)
def test_float32_with_every_option_compiles(chip):
  """float32 operands, gradients through all results, temperature, mask: the sweep for dhidden too."""

  def loss(hidden_NxH, weight_HxV, targets_N, temperature_N, mask_V):
    scored = linear_logprob(hidden_NxH, weight_HxV, targets_N, temperature=temperature_N, vocab_mask=mask_V)
    return jnp.sum(scored.logp + scored.lse * scored.entropy)

  program = compile_for(
    chip, jax.grad(loss, (0, 1)), abstract((1000, 2048), jnp.float32), abstract((2048, 20_000), jnp.float32),
    abstract((1000,), jnp.int32), abstract((1000,), jnp.float32), abstract((20_000,), jnp.bool_),
  )  # fmt: skip
  assert program.as_text().count(KERNEL) == 3


def partitioned(rows: int, vocab: int, gradient: bool):
  """The gradient, or the scores, on 4 chips, rows times vocabulary."""
  mesh = Mesh(devices_of("v5p:2x2x1").reshape(rows, vocab), ("rows", "vocab"))
  partition = Partition(mesh, ("rows",), ("vocab",))
  score = lambda h, w, t: linear_logprob(h, w, t, partition=partition).logp  # noqa: E731
  run = jax.grad(lambda h, w, t: jnp.sum(score(h, w, t)), (0, 1)) if gradient else score
  spread = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
  arguments = (
    spread((N, H), jnp.bfloat16, P("rows", None)),
    spread((H, V), jnp.bfloat16, P(None, "vocab")),
    spread((N,), jnp.int32, P("rows")),
  )
  return jax.jit(run).lower(*arguments).compile()


@pytest.mark.tpu_full
@pytest.mark.parametrize(
  "rows, vocab, forward, backward",
  # Over the vocabulary: a maximum and one sum of three numbers a token; and dhidden.  Over rows: dweight.
  [(1, 4, 2, 1), (2, 2, 2, 2), (4, 1, 0, 1)],
)
def test_collectives(rows, vocab, forward, backward):
  """Sums, and no all-gather: neither the weight nor logits move."""
  scores, program = (partitioned(rows, vocab, gradient) for gradient in (False, True))
  assert collectives(scores.as_text()) == ({"all-reduce": forward} if forward else {})
  text = program.as_text()
  assert collectives(text) == {"all-reduce": forward + backward}
  assert text.count(KERNEL) == 2
  shard = N // rows * V // vocab
  assert largest_buffer_elements(text, excluding=((H, V // vocab),)) < shard / 16
  assert temp_bytes(program) <= 24 * MIB


@pytest.mark.tpu
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
  mesh = Mesh(devices_of("v5p:2x2x1"), ("rows",))

  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(P("rows"), P(), P("rows")), out_specs=P("rows"), check_vma=check_vma
  )
  def score(hidden_NxH, weight_HxV, targets_N):
    return linear_logprob(hidden_NxH, weight_HxV, targets_N).logp

  shapes = (abstract((1024, 128), jnp.bfloat16), abstract((128, 1024), jnp.bfloat16), abstract((1024,), jnp.int32))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    spread = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
    arguments = [spread(x, spec) for x, spec in zip(shapes, (P("rows"), P(), P("rows")), strict=True)]
    grad = jax.jit(jax.grad(lambda h, w, t: jnp.sum(score(h, w, t)), (0, 1)))
    text = grad.lower(*arguments).compile().as_text()
  assert text.count(KERNEL) == 2 and collectives(text) == {"all-reduce": 1}


@pytest.mark.tpu
def test_explicit_mesh():
  """The arguments' own shardings decide, with no partition named."""
  mesh = jax.make_mesh(
    (2, 2), ("rows", "vocab"), axis_types=(jax.sharding.AxisType.Explicit,) * 2, devices=devices_of("v5p:2x2x1")
  )
  spread = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))  # noqa: E731
  loss = lambda h, w, t: jnp.sum(linear_logprob(h, w, t).logp)  # noqa: E731
  arguments = (
    spread((1024, 128), jnp.bfloat16, P("rows", None)),
    spread((128, 1024), jnp.bfloat16, P(None, "vocab")),
    spread((1024,), jnp.int32, P("rows")),
  )
  text = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile().as_text()
  assert text.count(KERNEL) == 2 and not re.search(r"all-gather", text)
