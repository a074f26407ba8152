"""Another engine in a process of its own, for `python -m rollout.bench`: JSON lines in, JSON lines out.

    python -m parity.bench_peer --engine=vllm|transformers --threads=N [--clock=wall|processor] [--device=cpu|gpu]

    first line out     {"versions": {...}}                          or {"error": ...} if the engine cannot be imported
    {"open": {"folder", "dtype", "slots", "length"}}    -> {}       a checkpoint, as `ring_jax.checkpoint.hf` writes it
    {"generate": {"prompts", "tokens"}}                 -> {"seconds"}       to draw that many for every prompt
    {"score": {"sequences"}}                            -> {"logps": [[...]...]}      of tokens from the second on

The process stays alive between requests, so that the bench can run engines in turns.  Both draw at temperature 1.  vLLM
also returns the log-probability of what it drew, as ring-jax does; transformers is spared that, which would cost it a
copy of all logits.  Transformers does not know the architecture by its own name; it runs as GLM-4-MoE (parity/glm4_moe.py).
"""

import os
import pathlib
import sys
import time
from typing import Any, Protocol

import numpy as np
from absl import app, flags

from parity.vllm import child
from ring_jax.checkpoint import hf, hf_config

_ENGINE = flags.DEFINE_enum("engine", None, ["vllm", "transformers"], "Which engine.", required=True)
_THREADS = flags.DEFINE_integer("threads", 1, "Threads it may use.", lower_bound=1)
_CLOCK = flags.DEFINE_enum("clock", "wall", ["wall", "processor"], "Time that passed, or that it computed.")
_DEVICE = flags.DEFINE_enum("device", "cpu", ["cpu", "gpu"], "What it computes on.")


class _Engine(Protocol):
  versions: dict[str, str]

  def open(self, folder: str, dtype: str, slots: int, length: int) -> None: ...

  def generate(self, prompts: list[list[int]], tokens: int) -> list[int]:
    """How many were drawn for each prompt."""

  def score(self, sequences: list[list[int]]) -> list[list[float]]: ...


class _VLLM:
  def __init__(self):
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    self.versions, _ = child.import_vllm()
    self._llm: Any = None

  def open(self, folder: str, dtype: str, slots: int, length: int) -> None:
    from vllm import LLM

    config, _ = hf_config.read(pathlib.Path(folder))
    positions = slots * (length + 256)  # some more than needed: a block is 128 positions
    size = positions * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 4
    self._llm = None
    self._llm = LLM(
      model=folder, dtype=dtype, skip_tokenizer_init=True, trust_remote_code=True, max_model_len=length,
      max_num_seqs=slots, max_logprobs=1, logprobs_mode="processed_logprobs", enforce_eager=True,
      enable_prefix_caching=False, gpu_memory_utilization=0.05, kv_cache_memory_bytes=max(size, 64 << 20),
      disable_log_stats=True,
    )  # fmt: skip

  def _run(self, prompts: list[list[int]], tokens: int, prompt_logprobs: int | None) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(
      max_tokens=tokens, temperature=1.0, detokenize=False, ignore_eos=True, logprobs=0, prompt_logprobs=prompt_logprobs
    )
    return self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

  def generate(self, prompts: list[list[int]], tokens: int) -> list[int]:
    return [len(output.outputs[0].token_ids) for output in self._run(prompts, tokens, None)]

  def score(self, sequences: list[list[int]]) -> list[list[float]]:
    outputs = self._run(sequences, 1, 0)
    return [
      [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
      for ids, output in zip(sequences, outputs, strict=True)
    ]


class _Transformers:
  def __init__(self):
    import torch
    import transformers

    from parity import torch_device

    torch.set_num_threads(_THREADS.value)
    torch_device.use("cuda" if _DEVICE.value == "gpu" else "cpu")
    transformers.logging.set_verbosity_error()
    self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    self._model: Any = None

  def open(self, folder: str, dtype: str, slots: int, length: int) -> None:
    import torch

    from parity import glm4_moe

    config, params = hf.load(folder)
    self._model = glm4_moe.build(config, params, getattr(torch, dtype))

  def generate(self, prompts: list[list[int]], tokens: int) -> list[int]:
    import torch

    ids = torch.as_tensor(prompts)
    with torch.inference_mode():
      out = self._model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=None, pad_token_id=0,
      ).cpu()  # fmt: skip
    return [out.shape[1] - ids.shape[1]] * len(prompts)

  def score(self, sequences: list[list[int]]) -> list[list[float]]:
    import torch

    from parity import glm4_moe

    scored = []
    for ids in sequences:
      logits_TxV = glm4_moe.logits(self._model, np.asarray([ids]))[0]
      logps_TxV = torch.log_softmax(torch.from_numpy(logits_TxV), dim=-1).numpy()
      scored.append(logps_TxV[np.arange(len(ids) - 1), ids[1:]].tolist())
    return scored


def _serve(engine: _Engine, request: dict[str, Any]) -> dict[str, Any]:
  ((kind, arguments),) = request.items()
  match kind:
    case "open":
      engine.open(**arguments)
      return {}
    case "generate":
      clock = {"wall": time.perf_counter, "processor": time.process_time}[_CLOCK.value]
      started = clock()
      drawn = engine.generate(**arguments)
      seconds = clock() - started
      if drawn != [arguments["tokens"]] * len(arguments["prompts"]):
        raise ValueError(f"asked for {arguments['tokens']} tokens a prompt, got {drawn}")
      return {"seconds": seconds}
    case "score":
      return {"logps": engine.score(**arguments)}
  raise ValueError(f"unknown request {kind}")


def main(argv: list[str]) -> None:
  del argv
  replies = child.take_stdout()
  try:
    engine = _VLLM() if _ENGINE.value == "vllm" else _Transformers()
  except ImportError as error:
    child.send(replies, {"error": f"{sys.executable} has no usable {_ENGINE.value} ({error})"})
    return
  child.send(replies, {"versions": engine.versions})
  child.answer(replies, lambda request: _serve(engine, request))


if __name__ == "__main__":
  app.run(main)
