"""The way of one set of weights to where they are used: every version is planned for, moved, checked and committed here.

    link = WeightLink(engine.abstract_stored())
    stored = link.send(packed, version)               every step: the same tree where it is wanted
    link.version, link.tree                           what was committed last

A version is committed as a whole, after all of it has arrived and was checked.  Until then, and after an error, `version`
and `tree` are those before.  The plan is kept for as long as the source lies as it did.
"""

import weakref
from collections.abc import Callable
from typing import Any

import jax

from configs.base import Enum
from sharding.transfer.check import Delivered, TransferError
from sharding.transfer.fan_out import cheapest
from sharding.transfer.move import execute
from sharding.transfer.plan import BUCKET_BYTES, PyTree, Route, TransferPlan


class Keep(Enum):
  """Whose a committed tree is, and so how many versions are in memory while the next one is under way."""

  LINK = "link"  # the link's: it is there, whatever becomes of the next one, which arrives beside it
  # The caller's: it is there for as long as the caller has it.  Who drops or frees it before the next `send` has room for
  # one version only; who does not can go on with it if the next one fails.
  CALLER = "caller"


class WeightLink:
  """Args:
  target: shapes and shardings, as they are wanted.
  keep: who keeps a tree alive.
  bucket_bytes, route: as of `plan_transfer`.
  """

  def __init__(
    self, target: PyTree, *, keep: Keep = Keep.LINK, bucket_bytes: int = BUCKET_BYTES, route: Route | None = None
  ):
    self._target, self._keep, self._bucket_bytes, self._route = target, keep, bucket_bytes, route
    self._structure = jax.tree.structure(target)
    self._version: int | None = None
    self._leaves: list[Callable[[], Any]] = []
    self._plan: TransferPlan | None = None

  @property
  def version(self) -> int | None:
    """The last that was committed; None: none was."""
    return self._version

  @property
  def tree(self) -> PyTree | None:
    """Its arrays; None: there are none, or somebody freed them."""
    leaves = [leaf() for leaf in self._leaves]
    if self._version is None or any(leaf is None or leaf.is_deleted() for leaf in leaves):
      return None
    return jax.tree.unflatten(self._structure, leaves)

  @property
  def plan(self) -> TransferPlan | None:
    """Of the last `send`."""
    return self._plan

  def send(
    self, params: PyTree, version: int | None = None, accept: Callable[[PyTree, int], None] | None = None
  ) -> PyTree:
    """Moves, checks and commits a version; returns its tree.

    Args:
      params: the target's tensors, from wherever they lie.
      version: larger than the last one; None: the next.
      accept: the last check, of the tree that arrived; raises TransferError to refuse it.

    Raises:
      TransferError: the version is not newer, or did not arrive as it was sent.
      ConfigError: the tree is not the target's.
    """
    last = self._version
    if version is None:
      version = 0 if last is None else last + 1
    if last is not None and version <= last:
      raise TransferError(f"version {version} after version {last}: versions must grow")
    if self._plan is None or self._plan.unlike(params):
      self._plan = cheapest(params, self._target, bucket_bytes=self._bucket_bytes, route=self._route)
    before = self.tree
    tree = execute(self._plan, params, version, None if before is None else Delivered(last, before)).tree
    if accept is not None:
      accept(tree, version)
    leaves = jax.tree.leaves(tree)
    self._version = version
    self._leaves = [weakref.ref(leaf) if self._keep is Keep.CALLER else _held(leaf) for leaf in leaves]
    return tree


def _held(leaf: jax.Array) -> Callable[[], jax.Array]:
  return lambda: leaf
