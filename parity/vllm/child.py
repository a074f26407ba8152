"""What runs in the interpreter that has vLLM: one JSON request a line in, one JSON reply a line out.

    first line out     {"versions": {...}, "device": "cpu"}    or {"error": ...} if vLLM cannot be imported
    each request       {"model", "dtype", "score", "prompts", "sampling", "experts", "max_model_len", ...}
    its reply          {"scored": [[logp...]...], "samples": [[{"tokens", "logps", "finish_reason"}...]...],
                        "experts": [{layer: [[id...]...]}...]}   or {"error": ...}

Every request gets a fresh engine: reloading weights in place is silently wrong on a CPU (vllm_cpu.md trap 3).  The file
imports nothing of ring-jax, so that any interpreter with vLLM can run it by its path.  What vLLM itself prints goes to
standard error.
"""

import contextlib
import gc
import json
import os
import re
import sys
from collections.abc import Callable
from typing import Any, TextIO

_ENVIRONMENT = {
  "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in process: hooks work, and an engine starts in 2 s instead of 30
  "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model takes a function
  "VLLM_NO_USAGE_STATS": "1",
  "HF_HUB_OFFLINE": "1",
}


def main() -> None:
  replies = take_stdout()
  try:
    versions, device = import_vllm()
  except ImportError as error:
    send(replies, {"error": f"{sys.executable} has no usable vLLM ({error})"})
    return
  send(replies, {"versions": versions, "device": device})
  answer(replies, lambda request: _serve(request, device))


def take_stdout() -> TextIO:
  """Standard output for replies alone: what anybody else prints goes to standard error."""
  replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)
  return replies


def import_vllm() -> tuple[dict[str, str], str]:
  """Imports vLLM, set up to run in this process; returns (versions, "cpu" or "cuda").

  Raises:
    ImportError: there is none, or it does not work.
  """
  os.environ.update(_ENVIRONMENT)
  # By path, because vLLM looks at a model's class in a process of its own.
  hidden = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hidden")
  sys.path.insert(0, hidden)
  os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [hidden, os.environ.get("PYTHONPATH")]))
  import torch

  if not torch.cuda.is_available():  # what vLLM would compile on a CPU takes longer to compile than to run
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
  import vllm
  from vllm.platforms import current_platform

  versions = {"vllm": vllm.__version__, "torch": torch.__version__}
  return versions, "cpu" if current_platform.is_cpu() else "cuda"


def send(replies: TextIO, message: dict[str, Any]) -> None:
  replies.write(json.dumps(message) + "\n")
  replies.flush()


def answer(replies: TextIO, serve: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
  """Serves requests until there are no more."""
  for line in sys.stdin:
    try:
      send(replies, serve(json.loads(line)))
    except Exception as error:  # the parent decides; the engine's own log is on standard error
      said = str(error).strip().splitlines()
      send(replies, {"error": f"{type(error).__name__}: {said[-1] if said else ''}"})


def _serve(request: dict[str, Any], device: str) -> dict[str, Any]:
  from vllm import LLM, SamplingParams

  llm = LLM(
    model=request["model"],
    dtype=request["dtype"],
    skip_tokenizer_init=True,
    trust_remote_code=True,
    max_model_len=request["max_model_len"],
    max_num_batched_tokens=max(2048, request["max_model_len"]),
    # A prompt that is cut into chunks has its generator wound back, which those of a CPU cannot.
    enable_chunked_prefill=False,
    enforce_eager=True,
    enable_prefix_caching=False,
    max_logprobs=1,
    logprobs_mode="processed_logprobs",  # of the distribution that is drawn from, temperature included
    gpu_memory_utilization=0.05 if device == "cpu" else request["gpu_memory_utilization"],
    kv_cache_memory_bytes=request["kv_cache_bytes"],
    disable_log_stats=True,
  )
  try:
    common = {"detokenize": False, "ignore_eos": True, "logprobs": 0}
    scoring = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, **common)
    scored, experts = [], []
    gates = _Gates(llm) if request["experts"] else None
    with gates or contextlib.nullcontext():
      for ids in request["score"]:  # one at a time: then the hooks see this sequence's tokens, in order
        (output,) = llm.generate([{"prompt_token_ids": ids}], scoring, use_tqdm=False)
        pairs = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        scored.append([entry[token].logprob for token, entry in pairs])
        if gates is not None:
          experts.append(gates.take(len(ids)))
    samples: list[Any] = []
    if request["prompts"]:
      wanted = request["sampling"]
      params = SamplingParams(
        temperature=wanted["temperature"], max_tokens=wanted["max_tokens"], seed=wanted["seed"], n=wanted["n"],
        stop_token_ids=wanted["stop"], **common,
      )  # fmt: skip
      outputs = llm.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], params, use_tqdm=False)
      samples = [[_sample(one) for one in sorted(out.outputs, key=lambda one: one.index)] for out in outputs]
    return {"scored": scored, "samples": samples, "experts": experts}
  finally:
    del llm
    gc.collect()


def _sample(output: Any) -> dict[str, Any]:
  tokens = list(output.token_ids)
  logps = [entry[token].logprob for token, entry in zip(tokens, output.logprobs, strict=True)]
  return {"tokens": tokens, "logps": logps, "finish_reason": output.finish_reason}


class _Gates:
  """Hooks on every router's linear layer, and the experts that its logits choose."""

  def __init__(self, llm: Any):
    self._logits: dict[int, list[Any]] = {}
    self._gates: dict[int, Any] = {}
    self._handles: list[Any] = []
    self._config = llm.llm_engine.model_config.hf_config
    llm.apply_model(self._attach)

  def _attach(self, model: Any) -> None:
    for name, module in model.named_modules():
      match = re.search(r"layers\.(\d+)\.mlp\.gate$", name)
      if match:
        layer = int(match[1])
        self._gates[layer] = module
        self._handles.append(module.register_forward_hook(self._hook(layer)))

  def _hook(self, layer: int) -> Any:
    def keep(module: Any, inputs: Any, output: Any) -> None:
      logits = output[0] if isinstance(output, tuple) else output
      # vLLM rounds the router's float32 logits to the model's dtype before it chooses (bailing_moe_v2.md 3.12).
      self._logits.setdefault(layer, []).append(logits.detach().to(inputs[0].dtype).float().cpu())

    return keep

  def __enter__(self) -> None:
    self._logits.clear()

  def __exit__(self, *_: Any) -> None:
    for handle in self._handles:
      handle.remove()

  def take(self, length: int) -> dict[int, list[list[int]]]:
    """Expert ids of the last sequence's tokens, by layer; forgets them."""
    import torch

    chosen = {}
    for layer, parts in sorted(self._logits.items()):
      scores = torch.cat(parts)[:length].sigmoid() + self._gates[layer].expert_bias.detach().float().cpu()
      chosen[layer] = self._choose(scores).tolist()
    self._logits.clear()
    return chosen

  def _choose(self, scores: Any) -> Any:
    """Group-limited top-k of biased scores [tokens, experts] (section 3.6)."""
    groups, kept = self._config.n_group, self._config.topk_group
    if groups > 1:
      split = scores.unflatten(1, (groups, -1))
      best = split.topk(2, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
      outside = best.new_ones(best.shape[0], groups).bool().scatter(1, best, False)
      scores = split.masked_fill(outside[..., None], float("-inf")).flatten(1)
    return scores.topk(self._config.num_experts_per_tok, dim=-1).indices


if __name__ == "__main__":
  del sys.path[0]  # this file's folder: its modules must not hide others
  main()
