"""Pathways on Cloud: whether JAX runs on it, and what its utilities prepare there.

They are imported only where it is used: they bring a checkpoint library and a web framework along, a second of every command.
"""

import jax


def used() -> bool:
  """As `pathwaysutils.is_pathways_backend_used()`: whether JAX's platform is the proxy."""
  return "proxy" in (jax.config.jax_platforms or "")


def initialize() -> None:
  """Comes before anything that asks JAX for its devices; does nothing elsewhere."""
  if used():
    import pathwaysutils

    pathwaysutils.initialize()
