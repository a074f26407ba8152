"""What others may ask of a running iteration; it is done between two dispatches.

Wishes come from any thread, in the order in which they are made.  The driver takes them when it looks; a paused driver
looks again when the next one comes.
"""

import dataclasses
import threading
from typing import Any


@dataclasses.dataclass(frozen=True)
class Abort:
  """A rollout is given up, in a slot or waiting; one that has ended already is none of its business."""

  uid: int


@dataclasses.dataclass(frozen=True)
class AbortGroup:
  """All of a group that have not ended."""

  group: int


@dataclasses.dataclass(frozen=True)
class Update:
  """New weights for what runs: the next tokens are drawn from them, under their version."""

  params: Any  # as the engine stores them
  version: int


Wish = Abort | AbortGroup | Update


class Control:
  """The caller's side of a driver."""

  def __init__(self):
    self._changed = threading.Condition()
    self._wishes: list[Wish] = []
    self._paused = self._draining = False

  # ---- of any thread

  def abort(self, uid: int) -> None:
    self._wish(Abort(uid))

  def abort_group(self, group: int) -> None:
    self._wish(AbortGroup(group))

  def update(self, params: Any, version: int) -> None:
    """Keys and values of what runs are kept or made anew, as `rollout.kv_policy` says."""
    self._wish(Update(params, version))

  def pause(self) -> None:
    """No dispatch begins from now on; what is in the slots stays there."""
    with self._changed:
      self._paused = True

  def resume(self) -> None:
    with self._changed:
      self._paused = False
      self._changed.notify_all()

  def drain(self) -> None:
    """Nothing new starts: the iteration ends when its slots are empty.  What waits stays for the next one."""
    with self._changed:
      self._draining, self._paused = True, False
      self._changed.notify_all()

  # ---- of the driver

  @property
  def draining(self) -> bool:
    return self._draining

  def take(self) -> list[Wish]:
    """All wishes since the last call; while paused, waits for one, or for the pause to end."""
    with self._changed:
      self._changed.wait_for(lambda: self._wishes or not self._paused)
      wishes, self._wishes = self._wishes, []
      return wishes

  @property
  def paused(self) -> bool:
    return self._paused

  def end(self) -> None:
    """The iteration is over, and with it the draining."""
    self._draining = False

  def _wish(self, wish: Wish) -> None:
    with self._changed:
      self._wishes.append(wish)
      self._changed.notify_all()
