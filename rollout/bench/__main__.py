"""Bench of the rollout engine beside vLLM and transformers: the same checkpoint, prompts, lengths and threads.

    python -m rollout.bench [--model=tiny|small] [--batch=1,16,64] [--dtype=float32|bfloat16] [--rounds=5] [--json]

A round asks every engine for every batch size in turn: a dispatch of tokens after each prompt, many tokens after each prompt, and
one token after each long prompt.  Decoding is what the many tokens took longer than the few; prefill is the long prompts
and their one token.  Everything is timed as a caller sees it, from token ids to token ids and log-probs on the host.  A
first round is not counted.

On a machine that others use too, `--threads=1 --clock=processor` counts the processor time that each engine takes: with
one thread, what the wall clock would show if the machine were free.

Where JAX runs on a GPU, every engine does; else the others run on the CPU.  An engine that is not installed is left out, and the report says so.  In float32 the others score what ours sampled, and a
difference of more than 1e-4 in a log-prob is an error.
"""

import functools
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from configs.parallel import MeshConfig
from configs.schema import ModelConfig, RolloutDtype
from ring_jax.model import Params, num_params
from rollout.bench import models, report
from rollout.bench.host import HostShare, processor
from rollout.bench.ours import Cut, Ours, mesh_of
from rollout.bench.peers import Peer, PeerError
from sharding.mesh import run_in_turn

_MODEL = flags.DEFINE_enum("model", "tiny", list(models.MODELS), "Which model.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the weights, and what is computed in.")
_BATCH = flags.DEFINE_list("batch", ["1", "16", "64"], "Sequences at once.")
_PROMPT = flags.DEFINE_integer("prompt", 32, "Tokens of a prompt that is decoded after.", lower_bound=1)
_LONG_PROMPT = flags.DEFINE_integer("long_prompt", 256, "Tokens of a prompt whose prefill is timed.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 128, "Tokens decoded.", lower_bound=2)
_STEPS = flags.DEFINE_integer("steps_per_dispatch", 16, "Of our engine.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Counted rounds.", lower_bound=1)
_PEERS = flags.DEFINE_list("peers", ["vllm", "transformers"], "Other engines.")
_CUT = flags.DEFINE_enum_class(
  "cut", None, Cut, "What of ours is cut over the threads, slots or weights; default: data for tiny, tensor for small."
)
_THREADS = flags.DEFINE_integer("threads", 0, "Processors that each engine may use; 0: all.", lower_bound=0)
_CLOCK = flags.DEFINE_enum("clock", "wall", ["wall", "processor"], "Time that passes, or that an engine computes.")
_PYTHON = flags.DEFINE_string("peer_python", "", "The Python that has the other engines; default: this one.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")

_CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
_TOLERANCE = 1e-4
_SCORED = 4  # sequences


def _use_threads() -> int:
  """JAX takes as many threads as there are processors for it, and so do the processes that are started; each is a device."""
  own = sorted(os.sched_getaffinity(0))
  os.sched_setaffinity(0, own[: _THREADS.value or len(own)])
  threads = len(os.sched_getaffinity(0))
  jax.config.update("jax_num_cpu_devices", threads)
  if threads > 1:
    run_in_turn()
  return threads


def _processor() -> str:
  return processor() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind


def _start(threads: int) -> tuple[dict[str, Peer], dict[str, str]]:
  """(the peers that there are, why the others are not)."""
  peers, absent = {}, {}
  device = "gpu" if jax.default_backend() == "gpu" else "cpu"
  for name in _PEERS.value:
    try:
      peers[name] = Peer(name, threads, _CLOCK.value, _PYTHON.value or None, device)
    except PeerError as error:
      absent[name] = str(error)
  return peers, absent


def _prompts(config: ModelConfig, count: int, length: int) -> list[list[int]]:
  return np.random.default_rng(length).integers(0, config.vocab_size, (count, length)).tolist()


def _mesh(config: ModelConfig, slots: int) -> MeshConfig:
  cut = _CUT.value or models.CUTS[_MODEL.value]
  return mesh_of(cut, len(jax.devices()), slots, config.num_key_value_heads)


class _Batch:
  """All engines, opened for one batch size."""

  def __init__(self, config: ModelConfig, params: Params, folder: pathlib.Path, peers: dict[str, Peer], slots: int):
    dtype, clock = RolloutDtype(_DTYPE.value), _CLOCKS[_CLOCK.value]
    self._short, self._long = (_prompts(config, slots, n) for n in (_PROMPT.value, _LONG_PROMPT.value))
    lengths = _PROMPT.value + _TOKENS.value, _LONG_PROMPT.value + 1
    # An engine for each shape, as a user would set it up.
    mesh = _mesh(config, slots)
    engine = functools.partial(Ours, config, params, dtype, slots=slots, steps=_STEPS.value, mesh=mesh, clock=clock)
    prompts = _PROMPT.value, _LONG_PROMPT.value
    short, long = (engine(prompt=prompt, length=length) for prompt, length in zip(prompts, lengths, strict=True))
    for peer in peers.values():
      peer.open(folder, dtype.value, slots, max(lengths))
    self.peers, self._ours = peers, short
    generate = {name: peer.generate for name, peer in peers.items()}
    self._decode = {report.OURS: lambda *arguments: short.generate(*arguments)[0]} | generate
    self._prefill = {report.OURS: lambda *arguments: long.generate(*arguments)[0]} | generate
    self.decode: report.Rates = {name: [] for name in self._decode}
    self.prefill: report.Rates = {name: [] for name in self._decode}

  def round(self, counted: bool) -> None:
    # A whole dispatch: a program for one step alone may cost many times what a step does.
    first = _STEPS.value if _STEPS.value < _TOKENS.value else 1
    for name, generate in self._decode.items():
      few, many = generate(self._short, first), generate(self._short, _TOKENS.value)
      long = self._prefill[name](self._long, 1)
      if counted:
        self.decode[name].append(len(self._short) * (_TOKENS.value - first) / max(many - few, 1e-9))
        self.prefill[name].append(len(self._long) * _LONG_PROMPT.value / long)

  def logp_differences(self) -> dict[str, float]:
    """The largest difference between the log-probs of what we sampled and the peers' of the same tokens."""
    _, token_NxB, logp_NxB = self._ours.generate(self._short, _TOKENS.value)
    rows = range(min(_SCORED, len(self._short)))
    sequences = [self._short[row] + token_NxB[:, row].tolist() for row in rows]
    found = {}
    for name, peer in self.peers.items():
      scored_BxN = np.asarray([logps[-len(token_NxB) :] for logps in peer.score(sequences)])
      found[name] = float(np.abs(scored_BxN.T - logp_NxB[:, : len(sequences)]).max())
    return found


def measure() -> dict[str, Any]:
  """Runs the bench.

  Raises:
    PeerError: an engine failed, or its log-probs are not ours.
  """
  threads = _use_threads()
  config, dtype = models.MODELS[_MODEL.value], RolloutDtype(_DTYPE.value)
  params = models.random_params(config)
  result: dict[str, Any] = {
    "model": _MODEL.value,
    "parameters": num_params(config),
    "dtype": dtype.value,
    "rounds": _ROUNDS.value,
    "decode_shape": f"{_TOKENS.value} tokens after {_PROMPT.value}",
    "prefill_shape": f"{_LONG_PROMPT.value} tokens",
    "machine": {"processor": _processor(), "threads": threads, "clock": _CLOCK.value},
    "cut": (_CUT.value or models.CUTS[_MODEL.value]).value,
    "versions": {"jax": jax.__version__},
    "decode": {}, "prefill": {}, "host_share": {}, "largest_logp_difference": {},
  }  # fmt: skip
  peers, result["absent"] = _start(threads)
  try:
    with tempfile.TemporaryDirectory() as folder:
      checkpoint = pathlib.Path(folder) / "checkpoint"
      models.save(checkpoint, config, params, dtype)
      for peer in peers.values():
        result["versions"] |= peer.versions
      for slots in map(int, _BATCH.value):
        print(f"batch {slots} ...", file=sys.stderr, flush=True)
        _measure_batch(result, _Batch(config, params, checkpoint, peers, slots), slots)
        share = HostShare(
          config, params, dtype, slots=slots, prompt=_PROMPT.value, tokens=_TOKENS.value, steps=_STEPS.value,
          mesh=_mesh(config, slots), clock=_CLOCKS[_CLOCK.value],
        )  # fmt: skip
        shares = [share.measure() for _ in range(_ROUNDS.value + 1)][1:]
        result["host_share"][slots] = report.Spread.of(shares)._asdict()
  finally:
    for peer in peers.values():
      peer.close()
  return result


def _measure_batch(result: dict[str, Any], batch: _Batch, slots: int) -> None:
  if _DTYPE.value == "float32":
    for name, gap in batch.logp_differences().items():
      if not gap <= _TOLERANCE:
        raise PeerError(
          f"batch {slots}: {name}'s log-probs differ from ours by {gap:.3g}, at most {_TOLERANCE:g} is right"
        )
      worst = result["largest_logp_difference"]
      worst[name] = max(gap, worst.get(name, 0.0))
  for round_ in range(_ROUNDS.value + 1):
    batch.round(counted=round_ > 0)
  result["decode"][slots], result["prefill"][slots] = report.summary(batch.decode), report.summary(batch.prefill)


def main(argv: list[str]) -> None:
  del argv
  if any(not size.isdecimal() or int(size) < 1 for size in _BATCH.value):
    raise app.UsageError(f"--batch={','.join(_BATCH.value)}: numbers of at least 1")
  try:
    result = measure()
  except PeerError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  print(json.dumps(result) if _JSON.value else "\n".join(report.lines(result)))


if __name__ == "__main__":
  app.run(main)
