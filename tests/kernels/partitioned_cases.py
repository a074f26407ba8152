"""Cases of the linear log-probability over a mesh; test_linear_logprob_partitioned.py runs them on 8 CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.icepop import IcePopConfig, policy_loss
from kernels.linear_logprob import Implementation, LinearLogprob, Partition, linear_logprob, tiles, xla_chunked
from kernels.linear_sample import linear_sample, token_keys

N, H, V = 256, 16, 520
BOTH = (Implementation.XLA_CHUNKED, Implementation.PALLAS_INTERPRET)


def quick():
  """A cut through the cases, for every `make test`."""
  one_tile()
  small_tiles()
  over_meshes(((2, 2),))
  ragged_vocabulary(BOTH[:1])
  explicit_mesh((None,))
  inside_shard_map(((None, True),))
  sampling(((520, (2, 4)),))
  policy((BOTH[0],))


def full():
  one_tile()
  small_tiles()
  over_meshes(((1, 4), (2, 2), (4, 1)))
  ragged_vocabulary(BOTH)
  explicit_mesh((None, Implementation.PALLAS_INTERPRET))
  auto_mesh()
  inside_shard_map(((None, True), (None, False), (Implementation.PALLAS_INTERPRET, False)))
  sampling(((1024, (2, 4)), (520, (2, 4)), (517, (1, 4)), (520, (4, 1))))
  policy(BOTH)


def small_tiles():
  """Several tiles and blocks in each shard."""
  tiles.TILES.update({chip: tiles.Tile(128, 128) for chip in tiles.TILES})
  xla_chunked._SINGLE_TILE_ELEMENTS, xla_chunked._VOCAB_CHUNK, xla_chunked._TILE_ELEMENTS = 0, 64, 32 * 64


def arrays(vocab=V):
  keys = jax.random.split(jax.random.key(0), 6)
  hidden_NxH = jax.random.normal(keys[0], (N, H))
  weight_HxV = jax.random.normal(keys[1], (H, vocab)) / H**0.5
  targets_N = jax.random.randint(keys[2], (N,), 0, vocab).at[0].set(0).at[1].set(vocab - 1).at[2].set(-1)
  mask_V = (jnp.arange(vocab) % 7 != 3).at[jnp.array([0, vocab - 1])].set(True)
  cotangents = LinearLogprob(*(jax.random.normal(key, (N,)) * (jnp.arange(N) % 3 > 0) for key in keys[3:]))
  return hidden_NxH, weight_HxV, targets_N, mask_V, cotangents


def run(hidden_NxH, weight_HxV, targets_N, mask_V, cotangents, used=(0, 1, 2), **options):
  """Values and gradients; only the results in `used` have a cotangent, the others not even a zero."""

  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
  def both(hidden_NxH, weight_HxV, targets_N, mask_V, cotangents):
    def loss(hidden_NxH, weight_HxV):
      scored = linear_logprob(hidden_NxH, weight_HxV, targets_N, vocab_mask=mask_V, temperature=0.7, **options)
      finite = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), scored)
      return sum(jnp.sum(finite[i] * cotangents[i]) for i in used), scored

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden_NxH, weight_HxV)

  (_, scored), gradients = both(hidden_NxH, weight_HxV, targets_N, mask_V, cotangents)
  return jax.tree.map(np.asarray, (*scored, *gradients))


def assert_close(got, want):
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def mesh_of(shape, axis_type):
  return jax.make_mesh(shape, ("rows", "vocab"), axis_types=(axis_type,) * 2, devices=jax.devices()[: np.prod(shape)])


def over_meshes(shapes):
  """The vocabulary cut, the tokens, and both: as on one device."""
  want = {used: run(*arrays(), used, implementation="reference") for used in ((0,), (0, 1, 2))}
  for shape in shapes:
    partition = Partition(mesh_of(shape, AxisType.Auto), ("rows",), ("vocab",))
    cases = (((0, 1, 2), BOTH[0]), ((0,), BOTH[1]), ((0, 1, 2), BOTH[1]))
    for used, implementation in cases[: 3 if shape == (2, 2) else 2]:
      got = run(*arrays(), used, implementation=implementation, partition=partition)
      assert_close(got, want[used])
  print("over_meshes")


def one_tile():
  """xla_chunked that keeps the only tile: its probabilities are of the shard until the shards know of each other."""
  partition = Partition(mesh_of((2, 2), AxisType.Auto), ("rows",), ("vocab",))
  got = run(*arrays(), implementation=BOTH[0], partition=partition)
  assert_close(got, run(*arrays(), implementation="reference"))
  print("one_tile")


def ragged_vocabulary(implementations):
  """A vocabulary that does not divide by its shards; and a shard in which no id can be drawn."""
  partition = Partition(mesh_of((2, 4), AxisType.Auto), ("rows",), ("vocab",))
  hidden_NxH, weight_HxV, targets_N, mask_V, cotangents = arrays(vocab=517)
  for mask in (mask_V, mask_V & (jnp.arange(517) < 300)):
    targets = jnp.where(mask[targets_N], targets_N, 0)
    case = (hidden_NxH, weight_HxV, targets, mask, cotangents)
    want = run(*case, implementation="reference")
    for implementation in implementations:
      assert_close(run(*case, implementation=implementation, partition=partition), want)
  print("ragged_vocabulary")


def explicit_mesh(implementations):
  """On a mesh with explicit axes the arguments say how they are spread; also where the mesh is the context."""
  want = run(*arrays(), implementation="reference")
  mesh = mesh_of((2, 4), AxisType.Explicit)
  specs = (P("rows", None), P(None, "vocab"), P("rows"), P(), LinearLogprob(*[P("rows")] * 3))
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
  spread = jax.tree.map(put, arrays(), specs)
  for implementation in implementations:
    assert_close(run(*spread, implementation=implementation), want)
  scored = linear_logprob(*spread[:3], vocab_mask=spread[3], temperature=0.7)  # outside of jit
  assert_close(scored, want[:3])
  with jax.set_mesh(mesh):
    assert_close(run(*spread), want)
    whole = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P())), arrays())
    assert_close(run(*whole), want)
  print("explicit_mesh")


def auto_mesh():
  """Without a partition XLA spreads the program, which is then xla_chunked on every platform."""
  mesh = mesh_of((2, 4), AxisType.Auto)
  with jax.set_mesh(mesh):
    hidden_NxH, weight_HxV, *rest = arrays()
    hidden_NxH = jax.device_put(hidden_NxH, NamedSharding(mesh, P("rows", None)))
    weight_HxV = jax.device_put(weight_HxV, NamedSharding(mesh, P(None, "vocab")))
    assert_close(run(hidden_NxH, weight_HxV, *rest), run(*arrays(), implementation="reference"))
  print("auto_mesh")


def inside_shard_map(ways):
  """Called with a shard of tokens and the whole weight, with and without JAX's check of what varies."""
  hidden_NxH, weight_HxV, targets_N, mask_V, cotangents = arrays()
  want = run(hidden_NxH, weight_HxV, targets_N, mask_V, cotangents, (0,), implementation="reference")
  mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
  for implementation, check in ways:

    @functools.partial(
      jax.shard_map, mesh=mesh, in_specs=(P("rows"), P(), P("rows"), P()), out_specs=P("rows"), check_vma=check
    )
    def score(hidden_NxH, weight_HxV, targets_N, mask_V, implementation=implementation):
      return linear_logprob(
        hidden_NxH, weight_HxV, targets_N, vocab_mask=mask_V, temperature=0.7, implementation=implementation
      ).logp

    def loss(hidden_NxH, weight_HxV, score=score):
      logp_N = score(hidden_NxH, weight_HxV, targets_N, mask_V)
      return jnp.sum(jnp.where(jnp.isfinite(logp_N), logp_N, 0) * cotangents.logp), logp_N

    (_, logp_N), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden_NxH, weight_HxV)
    assert_close((logp_N, *gradients), (want[0], *want[3:]))
  print("inside_shard_map")


def sampling(cuts):
  """The same tokens however the vocabulary is cut: shards of whole groups of noise, of parts of one, and padded."""
  hidden_NxH = arrays()[0]
  keys_Nx2 = token_keys(jnp.full(N, 1), jnp.arange(N), jnp.arange(N))
  for vocab, shape in cuts:
    weight_HxV, mask_V = arrays(vocab)[1], arrays(vocab)[3]
    options = {"temperature": 0.7, "vocab_mask": mask_V}
    want = linear_sample(hidden_NxH, weight_HxV, keys_Nx2, implementation="reference", **options)
    partition = Partition(mesh_of(shape, AxisType.Auto), ("rows",), ("vocab",))
    for implementation in BOTH:
      draw = jax.jit(functools.partial(linear_sample, implementation=implementation, partition=partition, **options))
      got = draw(hidden_NxH, weight_HxV, keys_Nx2)
      np.testing.assert_array_equal(got.token, want.token)
      assert_close(got[1:], want[1:])
  mesh = mesh_of((2, 4), AxisType.Explicit)
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
  got = linear_sample(
    put(hidden_NxH, P("rows", None)), put(weight_HxV, P(None, "vocab")), put(keys_Nx2, P("rows", None)), **options
  )
  np.testing.assert_array_equal(got.token, want.token)
  print("sampling")


def policy(implementations):
  """The IcePop loss over a mesh, and its ratio of exactly 1 against the scores over the same mesh."""
  hidden_NxH, weight_HxV, targets_N, mask_V, _ = arrays()
  targets_N = jnp.where(mask_V[targets_N], targets_N, 0)
  advantages_N = jnp.where(jnp.arange(N) % 2 == 0, 1.0, -1.0)
  trained_N = jnp.arange(N) % 5 > 0

  def losses(**options):
    score = lambda h, w: linear_logprob(h, w, targets_N, vocab_mask=mask_V, **options).logp  # noqa: E731
    old_N = jax.jit(score)(hidden_NxH, weight_HxV)

    @jax.jit
    def train(hidden_NxH, weight_HxV, old_N):
      def loss(hidden_NxH, weight_HxV):
        return policy_loss(
          hidden_NxH, weight_HxV, targets_N, old_N, old_N - 0.1, advantages_N, trained_N,
          IcePopConfig(aggregate="token_mean"), vocab_mask=mask_V, **options,
        )  # fmt: skip

      return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden_NxH, weight_HxV)

    (value, metrics), gradients = train(hidden_NxH, weight_HxV, old_N)
    np.testing.assert_array_equal(metrics["logp"], np.where(trained_N, old_N, 0))
    assert not np.any(gradients[0][~np.asarray(trained_N)])
    return value, *gradients

  want = losses(implementation="reference")
  partition = Partition(mesh_of((2, 4), AxisType.Auto), ("rows",), ("vocab",))
  for implementation in implementations:
    assert_close(losses(implementation=implementation, partition=partition), want)
  print("policy")
