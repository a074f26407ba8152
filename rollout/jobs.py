"""What a worker is given to decode, how far that is, and whether it can take more."""

import dataclasses
from collections.abc import Sequence

from ring_jax.records import FinishReason
from rollout.slots import Sampling


@dataclasses.dataclass(frozen=True)
class Job:
  """A token sequence to go on with, in a slot that is free."""

  slot: int
  uid: int  # keys the samples, with the position
  tokens: Sequence[int]  # the prompt, and what has been drawn before
  max_tokens: int  # it may still draw, at least 1
  sampling: Sampling | None = None  # None: as the engine's config says


@dataclasses.dataclass
class Crowding:
  """Whether a worker handed jobs back and nothing has ended since: more of them would only come back as well."""

  holds: bool = False

  def after(self, handed_back: bool, ended: bool) -> None:
    """A dispatch, or whatever else lets slots fall free."""
    self.holds = (self.holds or handed_back) and not ended


@dataclasses.dataclass
class Running:
  """A job in its slot."""

  job: Job
  limit: int  # tokens it may draw here
  reason: FinishReason  # why it ends at its limit
  version: int  # of the weights under which it came into its slot
  drawn: list[int] = dataclasses.field(default_factory=list)

  @property
  def tokens(self) -> list[int]:
    return [*self.job.tokens, *self.drawn]

  @property
  def length(self) -> int:
    return len(self.job.tokens) + len(self.drawn)

  @property
  def most(self) -> int:
    """Positions that it may ever write: the last token's are never needed."""
    return len(self.job.tokens) + self.limit - 1

  def ahead(self, steps: int) -> int:
    """Positions that are written after so many steps more."""
    return min(self.length + steps - 1, self.most)

  def rest(self) -> Job:
    """The same job, as it stands now."""
    return dataclasses.replace(self.job, tokens=self.tokens, max_tokens=self.job.max_tokens - len(self.drawn))
