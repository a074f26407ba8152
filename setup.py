"""ring-jax: reinforcement learning of mixture-of-experts models on TPU pods.  Pins for a known-good set: requirements/."""

from setuptools import find_packages, setup

SERVE = ["google-jetstream==0.2.2"]  # the full package; requirements/ installs it without its TensorFlow chain

setup(
  name="ring-jax",
  version="0.1.0",
  description="IcePop and C3PO++ for mixture-of-experts models in JAX, checked against PyTorch and vLLM",
  license="Apache-2.0",
  python_requires=">=3.11,<3.14",
  packages=find_packages(
    include=[
      f"{name}{rest}"
      for name in ("ring_jax", "sharding", "rollout", "parity", "kernels", "configs")
      for rest in ("", ".*")
    ]
  ),
  install_requires=[
    "absl-py>=2.0",
    "better-profanity>=0.7",
    "flax>=0.12.8",
    "grpcio>=1.60",
    "jax>=0.10.2,<0.13",
    "math-verify>=0.9",
    "matplotlib>=3.8",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.3",
    "packaging>=24",
    "pathwaysutils>=0.1.13",
    "prometheus-client>=0.20",
    "protobuf>=5",
    "psutil>=5.9",
    "pydantic>=2.5",
    "reasoning-gym>=0.1.25",
    "rich>=13",
    "safetensors>=0.5",
    "scipy>=1.11",
    "shortuuid>=1.0",
    "starlette>=0.40",
    "tensorboardX>=2.6",
    "tiktoken>=0.7",
    "tokenizers>=0.21",
    "uvicorn>=0.30",
  ],
  extras_require={
    "test": ["httpx2>=2", "hypothesis>=6", "openai>=3", "pytest>=8", "pytest-xdist>=3", "pyyaml>=6", "ruff>=0.9"],
    "parity": ["torch>=2.9", "transformers>=5.19"],
    "serve": SERVE,
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "gpu": ["jax[cuda12]>=0.10.2,<0.13"],
  },
)
