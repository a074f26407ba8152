"""The rollout engine: continuous batching over slots, behind JetStream's Engine API (architecture decision 7).

    prefill: prompts -> keys and values                    (shape buckets: a power of two of positions, a fixed batch)
    insert:  one prefilled row -> any number of slots      (a group's G slots share one prefill)
    decode:  k steps for all slots in one dispatch         (a slot that ends stays silent for the rest of the dispatch)

With keys and values in pages, who has which page is said by page tables that a host hands in (paged.py, filling.py), and two more
ways lead into a slot:

    extend:  the rest of a prompt whose beginning is in pages already
    join:    a slot whose pages hold all that it needs, but for one that is copied from a sibling's

The decode step is forward-then-sample: a slot holds its last token, whose keys and values are not in the cache yet.
So a token is drawn wholly from the weights that the step was given, and that version is what is recorded with it.

Weights are arguments of every call (decision 5); they come packed by `rollout.weights`.  `prefill`, `insert` and
`generate` are JetStream's methods and do the same for one prompt, one slot and one step.

Dimension key: B slots, W pages of a slot, P prompts of one prefill, T positions of a bucket, I insertions, N steps, V
vocabulary, L MoE layers, K experts a token.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import ModelConfig, RolloutConfig, require, to_dict
from kernels.attention import DenseCache, PagedCache
from ring_jax import model as ring_model
from ring_jax.model import KVCache
from ring_jax.rl.replay import ids_dtype
from rollout import slots, weights
from rollout.jetstream_compat import engine_api, tokenizer_pb2
from rollout.sampling import SamplingParams, sample
from rollout.slots import DecodeState, Extension, Insertion, Joining, Sampling
from sharding import rules
from sharding.transfer import Keep, WeightLink
from sharding.transfer.plan import named_leaves

_SMALLEST_BUCKET = 16


class Prefix(NamedTuple):
  """What a prefill leaves: P prompts, ready to be inserted."""

  kv: DenseCache  # [L, P, ..., T]
  last_token_P: jax.Array  # int32
  length_P: jax.Array  # int32


class Decoded(NamedTuple):
  """What N steps drew; entries of silent slots are not valid."""

  token_NxB: jax.Array  # int32
  logp_NxB: jax.Array  # float32
  valid_NxB: jax.Array  # bool
  experts_NxBxLxK: jax.Array | None  # of the position that the token was predicted at; None: not recorded


class Programs(NamedTuple):
  """What the engine runs on its devices; each compiles on first use."""

  pack: rules.Program  # the trainer's parameters -> as stored
  empty: rules.Program  # -> state
  prefill: rules.Program  # stored, tokens, lengths -> prefix
  insert: rules.Program  # prefix, state, rows, columns -> state
  extend: rules.Program  # stored, state, tokens, starts, counts, slots -> state
  join: rules.Program  # state, columns, pages to copy -> state
  decode: rules.Program  # stored, state, steps -> state, drawn
  release: rules.Program  # state, running, page table -> state
  table: rules.Program  # state -> page table


class RingEngine(engine_api.Engine):
  """Decodes `slots` sequences at once.

  Args:
    model: the architecture; the engine's compute dtype follows `config.dtype`.
    config: slots, lengths, sampling, weight dtype.
    eos_ids: tokens that end a sequence (they are drawn and recorded).
    vocab_mask_V: bool [vocab_size]; False for ids that can never be drawn.
    seed: of the samples.
    tokenizer_path: told to JetStream clients; the engine itself sees token ids only.
    mesh: of the axes in `configs.parallel`; None: one device.
  """

  def __init__(
    self,
    model: ModelConfig,
    config: RolloutConfig,
    *,
    eos_ids: Sequence[int],
    vocab_mask_V: np.ndarray,
    seed: int,
    tokenizer_path: str = "",
    mesh: jax.sharding.Mesh | None = None,
  ):
    if vocab_mask_V.shape != (model.vocab_size,):
      raise ValueError(f"vocab_mask_V has shape {vocab_mask_V.shape}, the model has {model.vocab_size} ids")
    self.config = config
    self.model = computed_model(model, config)
    self._rules, self._mesh, self._platform = self.model.parallel.rules, mesh, rules.platform(mesh)
    self.eos_ids = frozenset(eos_ids)
    self._eos = jnp.asarray(sorted(eos_ids), jnp.int32)
    self._mask_V = jnp.asarray(vocab_mask_V)
    self._sampling = Sampling(config.temperature, config.top_p, config.top_k, seed)
    self._tokenizer_path = tokenizer_path
    # Rounded up, so that caches of nearby settings share a compiled program and a bucket never exceeds the cache.
    self._length = bucket(config.max_len)
    self.page_size = min(config.page_size, self._length)  # 0: no pages
    # Devices with slots, and pages, of their own.
    self.batch_parts = 1 if mesh is None else self.model.parallel.batch_parts
    full = config.slots * (self._length // self.page_size) if self.page_size else 0
    for name in ("slots", "prefill_batch", "pages"):
      value = getattr(config, name)
      require(value % self.batch_parts == 0, f"rollout.{name}={value}: must be a multiple of {self.batch_parts}")
    config.check_pages(self.batch_parts)
    self.pages = (config.pages or full) // self.batch_parts  # of each of these devices
    self._longest = min(self._length, self.pages * self.page_size or self._length)
    self.programs = self._programs()
    self._packs: dict[jax.sharding.Mesh | None, rules.Program] = {}  # by the mesh that weights come from

  def _programs(self) -> "Programs":
    on_mesh = functools.partial(rules.Program, self._mesh)
    return Programs(
      pack=on_mesh(functools.partial(weights.pack, dtype=self.config.dtype)),
      empty=on_mesh(self._empty_fn),
      prefill=on_mesh(self._prefill_fn),
      insert=on_mesh(self._insert_fn, donate_argnums=1),
      extend=on_mesh(self._extend_fn, donate_argnums=1),
      join=on_mesh(functools.partial(slots.joined, axes=self._rules), donate_argnums=0),
      decode=on_mesh(self._decode_fn, donate_argnums=1, static_argnums=2),
      release=on_mesh(self._release_fn, donate_argnums=0),
      table=on_mesh(lambda state: rules.reshard(state.page_table_BxW, self._rules, None, None)),
    )

  # ---- weights and state

  def load_params(
    self,
    params: ring_model.Params,
    version: int | None = None,
    probe: Callable[[ring_model.Params, dict[str, Any], int | None], None] | None = None,
  ) -> dict[str, Any]:
    """The trainer's parameters as this engine stores and lays them out.

    What travels is cast or quantised already.  On the same devices in the same order it is one program; from other
    devices it is an exact transfer, checked bit for bit (sharding/transfer).  The tree is the caller's: a version that
    it dropped or freed takes no memory beside the next.

    Args:
      version: from other devices larger than the last one; None: the next.
      probe: of both sides and the version, the last check; raises TransferError.

    Raises:
      TransferError: what arrived is not what was sent; a version that the caller still has is as it was.
    """
    source = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = source.mesh if isinstance(source, jax.sharding.NamedSharding) else None
    if self._mesh is not None and (mesh is None or not np.array_equal(mesh.devices.flat, self._mesh.devices.flat)):
      packed = self._pack_on(mesh)(params)
      accept = None if probe is None else functools.partial(probe, params)
      return self._link.send(packed, version, accept)
    stored = self.programs.pack(params) if self._mesh is None else self.transfer(params)
    if probe is not None:
      probe(params, stored, version)
    return stored

  def _pack_on(self, mesh: jax.sharding.Mesh | None) -> rules.Program:
    """The same program for every version: a new one would be traced, and compiled, again."""
    if mesh not in self._packs:
      self._packs[mesh] = rules.Program(mesh, functools.partial(weights.pack, dtype=self.config.dtype))
    return self._packs[mesh]

  @functools.cached_property
  def _link(self) -> WeightLink:
    return WeightLink(self.abstract_stored(), keep=Keep.CALLER)

  def abstract_stored(self) -> dict[str, Any]:
    """The weights as the engine stores them: shapes and shardings."""
    return self.programs.pack.shapes(self.abstract_params())

  def abstract_params(self) -> ring_model.Params:
    """The trainer's parameters, laid out on the engine's devices: shapes and shardings."""
    return ring_model.abstract_params(self.model, self._mesh)

  def settings(self) -> dict[str, Any]:
    """All that its samples depend on, beside weights and jobs, as plain data: engines that agree draw the same tokens."""
    how = ("parallel", "remat", "initializer_range", "param_dtype", "max_position_embeddings")
    return {
      "model": {name: value for name, value in to_dict(self.model).items() if name not in how},
      "weights": [[name, leaf.dtype.name, list(leaf.shape)] for name, leaf in named_leaves(self.abstract_stored())],
      "vocabulary": np.flatnonzero(np.asarray(self._mask_V)).tolist(),
      "eos_ids": sorted(self.eos_ids),
      "sampling": list(self._sampling),
      "length": self._longest,
      "kv_policy": self.config.kv_policy.value,
    }

  @functools.cached_property
  def transfer(self) -> Any:
    """The program from the trainer's parameters, however they lie on the engine's devices."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_stored())
    return jax.jit(functools.partial(weights.pack, dtype=self.config.dtype), out_shardings=shardings)

  def init_decode_state(self) -> DecodeState:
    return self.programs.empty()

  def abstract_decode_state(self) -> DecodeState:
    """Its shapes and shardings."""
    return self.programs.empty.shapes()

  def _empty_fn(self) -> DecodeState:
    B = self.config.slots

    def each(dtype, value=0):  # a buffer of its own for every field: the state is donated
      return rules.reshard(jnp.full((B,), value, dtype), self._rules, "batch")

    cache = ring_model.init_cache(self.model, B, self._length, self.page_size, self.pages * self.batch_parts)
    axes, table_BxW = ring_model.cache_axes(cache), None
    if self.page_size:
      table_BxW = slots.first_table(B, self.batch_parts, self.page_width, self.pages)
      table_BxW = rules.reshard(table_BxW, self._rules, *slots.TABLE_AXES)
    return DecodeState(
      cache=type(cache)(*(rules.reshard(a, self._rules, *names) for a, names in zip(cache, axes, strict=True))),
      page_table_BxW=table_BxW,
      token_B=each(jnp.int32),
      position_B=each(jnp.int32),
      remaining_B=each(jnp.int32),
      generated_B=each(jnp.int32),
      uid_B=each(jnp.uint32),
      sampling=SamplingParams(each(jnp.float32, 1.0), each(jnp.float32, 1.0), each(jnp.int32), each(jnp.uint32)),
    )

  def release(
    self, state: DecodeState, running: Iterable[int] = (), page_table_BxW: np.ndarray | None = None
  ) -> DecodeState:
    """Every slot that is not among `running` falls idle; what its cache holds will be overwritten.

    Args:
      page_table_BxW: int32: who has which pages from now on; None: as before.
    """
    running_B = np.zeros((self.config.slots,), bool)
    running_B[list(running)] = True
    return self.programs.release(state, running_B, page_table_BxW)

  def page_table(self, state: DecodeState) -> np.ndarray:
    """int32 [B, W]."""
    return np.asarray(self.programs.table(state))

  @property
  def page_width(self) -> int:
    """W: pages of a slot at full length."""
    return self._length // self.page_size

  # ---- many at once: what the rollout driver calls

  def prefill_batch(self, params: dict[str, Any], prompts: Sequence[Sequence[int]]) -> Prefix:
    """Keys and values of up to `prefill_batch` token sequences, each at least one token long."""
    rows = self.config.prefill_batch
    if not 0 < len(prompts) <= rows:
      raise ValueError(f"{len(prompts)} prompts: a prefill takes from 1 to {rows}")
    longest = max(map(len, prompts))
    if not 0 < min(map(len, prompts)) <= longest <= self._length:
      raise ValueError(f"prompts of {min(map(len, prompts))} to {longest} tokens: from 1 to {self._length} fit")
    tokens_PxT = np.zeros((rows, bucket(longest)), np.int32)
    lengths_P = np.ones((rows,), np.int32)  # rows without a prompt hold one padding token and are never inserted
    for row, prompt in enumerate(prompts):
      tokens_PxT[row, : len(prompt)] = prompt
      lengths_P[row] = len(prompt)
    return self.programs.prefill(params, tokens_PxT, lengths_P)

  def insert_batch(self, prefix: Prefix, state: DecodeState, insertions: Sequence[Insertion]) -> DecodeState:
    """Fills slots from a prefix; a row may go to several slots."""
    size = bucket(len(insertions), smallest=8)
    rows = [insertion.row for insertion in insertions]
    row_I = np.asarray([*rows, *[0] * (size - len(rows))], np.int32)
    return self.programs.insert(
      prefix, state, row_I, slots.columns(insertions, size, self.config.slots, self._sampling)
    )

  def extend_batch(self, params: dict[str, Any], state: DecodeState, extensions: Sequence[Extension]) -> DecodeState:
    """Keys and values into the pages of slots; of each device's slots at most `prefill_batch / batch_parts`."""
    rows, own = self.config.prefill_batch // self.batch_parts, self.config.slots // self.batch_parts
    size = bucket(max(map(Extension.count, extensions)))
    tokens_PxT = np.zeros((self.config.prefill_batch, size), np.int32)
    starts_P, counts_P, slot_P = np.zeros((3, self.config.prefill_batch), np.int32)
    used = collections.Counter()
    for one in extensions:
      part, slot = divmod(one.slot, own)
      if used[part] == rows:
        raise ValueError(f"extend_batch: more than {rows} slots of device {part}")
      row = part * rows + used[part]
      used[part] += 1
      rest = one.tokens[one.start : -1]
      tokens_PxT[row, : len(rest)] = rest
      starts_P[row], counts_P[row], slot_P[row] = one.start, len(rest), slot
    return self.programs.extend(params, state, tokens_PxT, starts_P, counts_P, slot_P)

  def join_batch(self, state: DecodeState, joinings: Sequence[Joining]) -> DecodeState:
    """Begins slots whose pages hold what they need, or will once one page is copied."""
    size = bucket(len(joinings), smallest=8)
    padding = [0] * (size - len(joinings))
    each = lambda name: np.asarray([*(getattr(one, name) for one in joinings), *padding], np.int32)  # noqa: E731
    target_I = each("target")
    columns = slots.columns(joinings, size, self.config.slots, self._sampling)._replace(
      token_I=each("token"), position_I=each("position")
    )
    return self.programs.join(state, columns, each("source"), np.where(target_I < 0, self.pages, target_I))

  def decode(self, params: dict[str, Any], state: DecodeState, steps: int) -> tuple[DecodeState, Decoded]:
    """`steps` decode steps of all slots."""
    return self.programs.decode(params, state, steps)

  # ---- JetStream's Engine API

  def prefill(self, *, params, existing_prefix=None, padded_tokens, true_length: int) -> Prefix:
    """One prompt; `padded_tokens` [T], of which `true_length` count."""
    if existing_prefix is not None:
      raise ValueError("existing_prefix: this engine prefills whole prompts only")
    return self.prefill_batch(params, [np.asarray(padded_tokens)[:true_length].tolist()])

  def insert(self, prefix: Prefix, decode_state: DecodeState, slot: int) -> DecodeState:
    """Row 0 of the prefix into one slot, which may draw until its cache is full."""
    require(not self.config.pages, "rollout.pages: a JetStream client has slots of full length, and needs 0 here")
    room = int(self._length - prefix.length_P[0])
    return self.insert_batch(prefix, decode_state, [Insertion(row=0, slot=slot, uid=slot, max_tokens=room)])

  def generate(self, params, decode_state: DecodeState) -> tuple[DecodeState, engine_api.ResultTokens]:
    """One step; per slot: token, whether it is valid, tokens drawn so far."""
    state, drawn = self.decode(params, decode_state, 1)
    data_Bx3 = jnp.stack([drawn.token_NxB[0], drawn.valid_NxB[0].astype(jnp.int32), state.generated_B], axis=1)
    return state, engine_api.ResultTokens(
      data=data_Bx3, tokens_idx=(0, 1), valid_idx=(1, 2), length_idx=(2, 3), samples_per_slot=1
    )

  def get_prefix_destination_sharding(self) -> Any:
    if self._mesh is None:
      return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())

  def get_tokenizer(self) -> tokenizer_pb2.TokenizerParameters:
    return tokenizer_pb2.TokenizerParameters(path=self._tokenizer_path)

  @property
  def max_concurrent_decodes(self) -> int:
    return self.config.slots

  @property
  def samples_per_slot(self) -> int:
    return 1

  @property
  def max_prefill_length(self) -> int:
    """The longest sequence that a slot can hold."""
    return self._longest

  @property
  def mesh(self) -> jax.sharding.Mesh:
    if self._mesh is not None:
      return self._mesh
    return jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("data",))

  @property
  def colocated_cpus(self) -> None:
    return None

  # ---- the programs

  def _prefill_fn(self, params, tokens_PxT, lengths_P) -> Prefix:
    segments_PxT = (jnp.arange(tokens_PxT.shape[1]) < lengths_P[:, None]).astype(jnp.int32)
    out = ring_model.forward(
      self.model, weights.unpack(params, self.model.dtype), tokens_PxT, segment_ids_BxT=segments_PxT,
      return_kv=True, mtp=False,
    )  # fmt: skip
    last_P = jnp.take_along_axis(tokens_PxT, lengths_P[:, None] - 1, axis=1)[:, 0]
    return Prefix(out.kv, last_P, lengths_P)

  def _insert_fn(self, prefix: Prefix, state: DecodeState, row_I, columns: slots.Columns) -> DecodeState:
    axes = slots.state_axes(state)
    whole = (None, None, "kv_heads", None, None)  # a row may go to any device's slots
    insert = rules.manual(
      self._insert_local,
      self._rules,
      (Prefix(DenseCache(whole, whole), (), ()), axes, (), slots.COLUMNS_WHOLE),
      axes,
    )
    return insert(prefix, state, row_I, columns)

  def _insert_local(self, prefix: Prefix, state: DecodeState, row_I, columns: slots.Columns) -> DecodeState:
    """One device's slots."""
    columns = columns._replace(
      slot_I=slots.own(columns.slot_I, len(state.token_B), self._rules),
      token_I=prefix.last_token_P[row_I],
      position_I=prefix.length_P[row_I] - 1,
    )
    return slots.begun(state._replace(cache=_inserted(state, prefix, row_I, columns.slot_I)), columns)

  def _extend_fn(self, stored, state: DecodeState, tokens_PxT, starts_P, counts_P, slot_P) -> DecodeState:
    table_PxW = slots.rows_of(state, slot_P, self._rules)
    params = weights.unpack(stored, self.model.dtype)
    cache = ring_model.extend(self.model, params, tokens_PxT, starts_P, counts_P, state.cache, table_PxW)
    return state._replace(cache=cache)

  def _release_fn(self, state: DecodeState, running_B, page_table_BxW) -> DecodeState:
    running_B = rules.reshard(running_B, self._rules, "batch")
    if page_table_BxW is not None:
      state = state._replace(page_table_BxW=rules.reshard(page_table_BxW, self._rules, *slots.TABLE_AXES))
    return state._replace(remaining_B=jnp.where(running_B, state.remaining_B, 0))

  def _decode_fn(self, stored, state: DecodeState, steps: int) -> tuple[DecodeState, Decoded]:
    params, records = weights.unpack(stored, self.model.dtype), self.config.router_replay
    by_bits = isinstance(state.cache, DenseCache) and self.model.dtype == "bfloat16" and self._platform == "cpu"
    if by_bits:
      state = state._replace(cache=state.cache.bits())

    def step(state: DecodeState, _):
      active_B = state.remaining_B > 0
      hidden_BxD, cache, *experts = ring_model.decode_step(
        self.model,
        params,
        state.token_B,
        state.position_B,
        active_B,
        state.cache,
        state.page_table_BxW,
        return_experts=records,
      )
      token_B, logp_B = sample(
        hidden_BxD, params["lm_head"]["kernel"], self._mask_V, state.sampling, state.uid_B, state.position_B + 1,
        self._rules,
      )  # fmt: skip
      ended_B = (token_B[:, None] == self._eos).any(axis=-1)
      moved = active_B.astype(jnp.int32)
      state = state._replace(
        cache=cache,
        token_B=jnp.where(active_B, token_B, state.token_B),
        position_B=state.position_B + moved,
        remaining_B=jnp.where(active_B & ~ended_B, state.remaining_B - 1, 0),
        generated_B=state.generated_B + moved,
      )
      experts_BxLxK = experts[0].transpose(1, 0, 2).astype(ids_dtype(self.model.num_experts)) if records else None
      return state, Decoded(token_B, logp_B, active_B, experts_BxLxK)

    state, drawn = jax.lax.scan(step, state, length=steps)
    if by_bits:
      state = state._replace(cache=state.cache.values())
    # Whole on every device, so that any process can read it.
    return state, jax.tree.map(lambda x: rules.reshard(x, self._rules, *[None] * x.ndim), drawn)


def _inserted(state: DecodeState, prefix: Prefix, row_I: jax.Array, slot_I: jax.Array) -> KVCache:
  """The cache with rows of a prefix in slots; a slot beyond the last is dropped."""
  kv, cache, own = prefix.kv, state.cache, len(state.token_B)
  if isinstance(cache, DenseCache):
    T = kv.v_LxBxKxSxd.shape[3]
    return DenseCache(
      cache.k_LxBxKxdxS.at[:, slot_I, :, :, :T].set(kv.k_LxBxKxdxS[:, row_I], mode="drop"),
      cache.v_LxBxKxSxd.at[:, slot_I, :, :T].set(kv.v_LxBxKxSxd[:, row_I], mode="drop"),
    )

  def one(cache: PagedCache, column) -> tuple[PagedCache, None]:  # one after the other: no copy of all rows at once
    row, slot = column
    k_LxTxKxd = jax.lax.dynamic_index_in_dim(kv.k_LxBxKxdxS, row, axis=1, keepdims=False).transpose(0, 3, 1, 2)
    v_LxTxKxd = jax.lax.dynamic_index_in_dim(kv.v_LxBxKxSxd, row, axis=1, keepdims=False).transpose(0, 2, 1, 3)
    length = jnp.where(slot < own, prefix.length_P[row], 0)
    return cache.insert(k_LxTxKxd, v_LxTxKxd, state.page_table_BxW[jnp.minimum(slot, own - 1)], length), None

  return jax.lax.scan(one, cache, (row_I, slot_I))[0]


def computed_model(model: ModelConfig, config: RolloutConfig) -> ModelConfig:
  """The architecture as an engine computes it: in its dtype, on its mesh."""
  dtype = weights.compute_dtype(config.dtype, model.dtype)
  return dataclasses.replace(model, dtype=dtype, parallel=config.parallel or model.parallel)


def bucket(size: int, smallest: int = _SMALLEST_BUCKET) -> int:
  """The next power of two: few shapes, so few compilations."""
  return max(smallest, 1 << (size - 1).bit_length())
