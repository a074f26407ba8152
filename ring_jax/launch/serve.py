"""Serves a checkpoint: an OpenAI-compatible HTTP front, and JetStream's gRPC service where it is asked for.

    python -m ring_jax.launch.serve --checkpoint=runs/ring_tiny --port=8000
    python -m ring_jax.launch.serve --checkpoint=Ring-mini-2.0 --dtype=bfloat16 --slots=64 --max_tokens=8192 --grpc_port=9000
    curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "2 + 2 =", "max_tokens": 8}'

It listens on this machine only, unless --host says otherwise.  A key is best given by the environment, as RING_JAX_API_KEY:
flags can be seen by every user of the machine.  docs/serving.md has fields, limits and examples.
"""

import dataclasses
import os

from absl import flags

from configs.schema import RolloutDtype, require
from ring_jax.launch import app
from rollout.serving.server import serve
from rollout.serving.settings import Settings, parse_mesh

FLAGS = flags.FLAGS
_KEY = "RING_JAX_API_KEY"


def define_flags() -> None:
  of = {field.name: field.default for field in dataclasses.fields(Settings)}
  flags.DEFINE_string("checkpoint", None, "Hugging Face folder, Orbax step folder or workdir.", required=True)
  flags.DEFINE_string("tokenizer", of["tokenizer"], "A tokenizer.json or its folder; default: beside the checkpoint.")
  flags.DEFINE_string("host", of["host"], "The address to listen on; 0.0.0.0: all of this machine.")
  flags.DEFINE_integer("port", of["port"], "Of HTTP; 0: any that is free.")
  flags.DEFINE_integer("grpc_port", of["grpc_port"], "Of JetStream's gRPC service; 0: none.")
  flags.DEFINE_string("api_key", None, f"Asked of every request to /v1; default: {_KEY} of the environment, else none.")
  flags.DEFINE_string(
    "ssl_certfile", of["ssl_certfile"], "PEM certificate, with its chain: HTTPS; default: plain HTTP."
  )
  flags.DEFINE_string("ssl_keyfile", of["ssl_keyfile"], "Its PEM key; default: in --ssl_certfile.")
  flags.DEFINE_string("model_name", of["model_name"], "What clients call the model; default: the checkpoint's folder.")
  flags.DEFINE_enum("dtype", None, [str(dtype) for dtype in RolloutDtype], "Of the weights; default: as stored.")
  flags.DEFINE_string("mesh", "", "Devices along the axes of the mesh, as in data=2,tensor=4; default: one device.")
  flags.DEFINE_integer("slots", of["slots"], "Sequences decoded at once.")
  flags.DEFINE_integer(
    "page_size", of["page_size"], "Positions of a page of keys and values; 0: a slot's in one piece."
  )
  flags.DEFINE_integer("pages", of["pages"], "Of all slots; 0: as many as they need at full length.")
  flags.DEFINE_integer("steps_per_dispatch", of["steps_per_dispatch"], "Tokens a stream gets at a time.")
  flags.DEFINE_integer(
    "max_prompt_tokens", None, "Longer prompts are refused; default: up to 1024, as the model allows."
  )
  flags.DEFINE_integer("max_tokens", None, "Of an answer, at most; default: up to 1024, as the model allows.")
  flags.DEFINE_integer("max_waiting", of["max_waiting"], "Sequences without a slot beyond which requests get a 429.")
  flags.DEFINE_integer("max_body_bytes", of["max_body_bytes"], "Of a request.")
  flags.DEFINE_integer("max_connections", of["max_connections"], "Open at once; more get a 503.")
  flags.DEFINE_float("temperature", of["temperature"], "Of requests that do not say; 0: greedy.")
  flags.DEFINE_float("top_p", of["top_p"], "Of requests that do not say; 1: off.")
  flags.DEFINE_integer("top_k", of["top_k"], "Of requests that do not say; 0: off.")
  flags.DEFINE_bool("thinking", None, "Whether a chat's answer begins with a thought; default: as in the run, else no.")


def main() -> None:
  given = {field.name: getattr(FLAGS, field.name) for field in dataclasses.fields(Settings)}
  key = os.environ.get(_KEY) if given["api_key"] is None else given["api_key"]
  require(key != "", f"--api_key or {_KEY} is empty: leave it out, or give a key")
  dtype = given["dtype"] and RolloutDtype(given["dtype"])
  serve(Settings(**given | {"api_key": key or "", "dtype": dtype, "mesh": parse_mesh(given["mesh"])}))


if __name__ == "__main__":
  define_flags()
  app.run(main)
