"""What a study is: points to measure, and what they say together.

A point is one measurement with one seed, in a folder and a process of its own.  Its result is plain JSON data and all that
the report sees, so that a report can be written again at any time without measuring again.
"""

import abc
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]  # plain JSON data


@dataclasses.dataclass(frozen=True)
class Settings:
  """How much of a study."""

  seeds: int = 5
  quick: bool = False  # a form that takes at most two minutes and shows that all of it works, not what it says

  @property
  def all_seeds(self) -> range:
    return range(1 if self.quick else self.seeds)


@dataclasses.dataclass(frozen=True)
class Point:
  """One measurement.

  A point with `alone` has the machine to itself: what it times would be slowed down by its neighbours.  One with `turns` has all
  cores too, beside another such point that traces and compiles, and is alone only for as long as it says (`Turn`).
  """

  arm: str  # what is varied: letters, digits, "_" and "-"
  seed: int = 0
  needs: tuple[str, ...] = ()  # names of points that come first
  devices: int = 1  # CPU devices that it sees
  alone: bool = False
  turns: bool = False

  @property
  def name(self) -> str:
    return f"{self.arm}_seed{self.seed}"


class Turn:
  """The machine to itself, between the two calls."""

  def begin(self) -> None:
    """Waits until no other point runs."""

  def end(self) -> None:
    """Lets the others go on."""


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a point works: a folder that is kept when it is interrupted, and those of the points that it needs."""

  folder: pathlib.Path
  of: Callable[[str], pathlib.Path]  # by the name of a point
  turn: Turn


@dataclasses.dataclass(frozen=True)
class Table:
  title: str
  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
  name: str  # of the file, without .png
  caption: str
  image: bytes  # a PNG


@dataclasses.dataclass(frozen=True)
class Report:
  """What a study found."""

  findings: Sequence[str]  # sentences, the most important one first
  tables: Sequence[Table]
  figures: Sequence[Figure]
  not_shown: Sequence[str]  # what a reader might think that it shows


class Results:
  """The results that there are, by arm and seed."""

  def __init__(self, found: Mapping[Point, Result]):
    self._found = found

  def of(self, arm: str) -> list[Result]:
    """In the order of seeds."""
    return [self._found[point] for point in sorted(self._of(arm), key=lambda point: point.seed)]

  def seeds(self, arm: str) -> list[int]:
    return sorted(point.seed for point in self._of(arm))

  def arms(self) -> list[str]:
    """Those that have results, in the order of points."""
    return list(dict.fromkeys(point.arm for point in self._found))

  def _of(self, arm: str) -> list[Point]:
    return [point for point in self._found if point.arm == arm]


class Study(abc.ABC):
  """Has no state: a point's process makes its own."""

  name: str
  title: str
  claim: str  # what the paper says, and where

  @abc.abstractmethod
  def points(self, settings: Settings) -> list[Point]:
    """All of them, those that others need first."""

  @abc.abstractmethod
  def measure(self, point: Point, settings: Settings, place: Place) -> Result:
    """Measures one; goes on where an earlier try was stopped."""

  @abc.abstractmethod
  def report(self, settings: Settings, results: Results) -> Report:
    """Of the points that have been measured: perhaps not all of them."""
