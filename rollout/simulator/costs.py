"""What the engine and the trainer cost, in seconds.

    a decode step of n sequences       decode_step + n decode_per_slot + decode_per_kv_token (tokens in their caches)
    a prefill of d sequences           ceil(d / prefill_batch) prefill_call + their tokens * prefill_per_token
    between two rollout phases         sync + train_update + trained tokens * train_per_token

`decode_table` gives measured steps instead of the line: [[n, seconds], ...], straight between its points.  Prefill and
decode take turns, as in the live driver.

The defaults are no machine's.  They have the proportions of a memory-bound engine whose step is twice as long with 512
sequences as with one, and of a trainer that spends on a token about what decoding it costs in a full batch; a real
engine's come from `--calibrate`.
"""

import bisect
import dataclasses
import itertools
import json
import math
import pathlib
from typing import Any

from configs.base import ConfigError, require, to_dict


@dataclasses.dataclass(frozen=True)
class Costs:
  decode_step: float = 0.01  # of a step, whatever is in the slots: reading the weights
  decode_per_slot: float = 2e-5  # for each sequence that draws a token
  decode_per_kv_token: float = 0.0  # for each token in their caches
  decode_table: tuple[tuple[int, float], ...] = ()  # instead of the first two
  prefill_call: float = 0.0  # of one dispatch
  prefill_per_token: float = 1e-5
  sync: float = 5.0  # new weights to the engine
  train_update: float = 0.0  # of an update, whatever its size
  train_per_token: float = 4e-5

  def __post_init__(self):
    for name in SCALARS:
      value = getattr(self, name)
      require(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0,
        f"costs.{name}={value!r}: must be a number of at least 0",
      )
    object.__setattr__(self, "decode_table", _table(self.decode_table))
    require(
      self.decode_seconds(1) > 0, "costs: a decode step must take time (decode_step, decode_per_slot or decode_table)"
    )

  def decode_seconds(self, active: int) -> float:
    """Of one step of `active` sequences, their caches apart."""
    if not self.decode_table:
      return self.decode_step + self.decode_per_slot * active
    counts = [count for count, _ in self.decode_table]
    right = bisect.bisect_left(counts, active)
    if right == 0 or right == len(counts):  # beyond the table: as at its end
      return self.decode_table[min(right, len(counts) - 1)][1]
    (low, before), (high, after) = self.decode_table[right - 1 : right + 1]
    return before + (after - before) * (active - low) / (high - low)

  def update_seconds(self, tokens: int) -> float:
    """Training on so many tokens."""
    return self.train_update + self.train_per_token * tokens


SCALARS = tuple(field.name for field in dataclasses.fields(Costs) if field.name != "decode_table")


def _table(rows: Any) -> tuple[tuple[int, float], ...]:
  good = isinstance(rows, (list, tuple)) and all(isinstance(row, (list, tuple)) and len(row) == 2 for row in rows)
  good = good and all(type(count) is int and type(seconds) in (int, float) for count, seconds in rows)
  good = good and all(count >= 1 and math.isfinite(seconds) and seconds > 0 for count, seconds in rows)
  good = good and all(one[0] < other[0] for one, other in itertools.pairwise(rows))
  require(
    good, "costs.decode_table: must be [[sequences, seconds], ...], sequences rising from at least 1, seconds > 0"
  )
  return tuple((count, float(seconds)) for count, seconds in rows)


def read_costs(path: str) -> Costs:
  """Costs from a JSON object; what it does not name keeps its default.

  Raises:
    ConfigError: the file cannot be read, or names what is no cost.
  """
  try:
    data = json.loads(pathlib.Path(path).read_text())
  except OSError as error:
    raise ConfigError(f"--costs={path}: cannot be read ({error.strerror})") from None
  except ValueError as error:
    raise ConfigError(f"--costs={path}: is not JSON ({error})") from None
  require(isinstance(data, dict), f"--costs={path}: must be a JSON object")
  known = [field.name for field in dataclasses.fields(Costs)]
  unknown = sorted(set(data) - set(known))
  require(not unknown, f"--costs={path}: {', '.join(unknown)} is no cost; there are {', '.join(known)}")
  line = [name for name in ("decode_step", "decode_per_slot") if name in data]
  require(
    not (data.get("decode_table") and line), f"--costs={path}: decode_table contradicts {' and '.join(line)}: give one"
  )
  return Costs(**data)


def costs_dict(costs: Costs) -> dict[str, Any]:
  """As `read_costs` takes them: the table or the line."""
  hidden = ("decode_step", "decode_per_slot") if costs.decode_table else ("decode_table",)
  return {name: value for name, value in to_dict(costs).items() if name not in hidden}
