"""Problems, the text around them, and how answers are scored."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from configs.base import Enum, coerce_enum, require


class ChatTemplate(Enum):
  BASE = "base"  # <role>HUMAN</role>question<role>ASSISTANT</role>
  CHAT = "chat"  # the SFT template of Ling 2.0, with its system block and <|role_end|>


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Where token ids come from."""

  path: str = ""  # a tokenizer.json, or a folder that holds one; empty: build one from the run's own text
  merges: int = 0  # how many BPE merges a built tokenizer learns (beyond those of the template's own words)
  template: ChatTemplate = ChatTemplate.BASE
  thinking: bool = False  # whether the generation prompt opens <think>

  def __post_init__(self):
    coerce_enum(self, "template", ChatTemplate, "tokenizer")
    require(self.merges >= 0, f"tokenizer.merges={self.merges}: must be at least 0")


@dataclasses.dataclass(frozen=True)
class TaskSource:
  """One Reasoning Gym task in a mixture."""

  name: str  # any name that Reasoning Gym knows
  weight: float = 1.0
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of that task's own config
  prompt: str = "{question}"  # Python format over question, answer and the entry's metadata
  completion: str = "{answer}"  # what SFT imitates; the same fields, and {trace} where the task has one

  def __post_init__(self):
    require(bool(self.name), "task.mixture: a source needs a name")
    require(self.weight > 0, f"task.mixture: weight={self.weight} of {self.name}: must be > 0")


class AnswerFormat(Enum):
  """How the answer is found in what the model wrote."""

  ALL = "all"  # the whole completion (after </think> where thinking is on)
  BOXED = "boxed"  # the last \\boxed{...}, compared by MathVerify
  HASH = "hash"  # what follows the only '#'


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """Problems, and how answers to them are scored."""

  mixture: tuple[TaskSource, ...]
  train_size: int = 20_000  # problems per source, before those seen in the held-out set are removed
  held_out_size: int = 512  # problems, all sources together
  answer: AnswerFormat = AnswerFormat.ALL
  exact: bool = True  # only a full score is a 1; off: partial credit of the task's scorer
  deadline: float = 2.0  # seconds for one answer's score
  workers: int = 1  # scoring processes
  exclude_profanity: bool = True  # leave out problems whose text holds words that should not be shown

  def __post_init__(self):
    coerce_enum(self, "answer", AnswerFormat, "task")
    object.__setattr__(self, "mixture", tuple(self.mixture))
    require(len(self.mixture) > 0, "task.mixture: needs at least one source")
    require(self.train_size > 0 and self.held_out_size > 0, "task: train_size and held_out_size must be at least 1")
    require(self.deadline > 0, f"task.deadline={self.deadline}: must be > 0 seconds")
    require(self.workers > 0, f"task.workers={self.workers}: must be at least 1")
