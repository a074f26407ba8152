"""What a compiled program exchanges between devices, read from its optimised HLO.

The text lists computations; instructions call others (fusions, loops, branches).  Starting from ENTRY every collective is
counted as often as it runs: a loop's body as often as the loop turns, which its condition tells by the constant that the
counter is compared with.  What stands in a branch may not run at all and is counted apart, under `conditional`.

XLA's own `cost_analysis` counts a loop's body once (reference notes, pallas.md section 3), hence this.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
)  # fmt: skip

_BYTES = {
  "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
  "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
  r"^\s+(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(calls|body|condition|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(
  r"(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))"
)
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])")
_CONSTANT = re.compile(r"constant\((\d+)\)")


@dataclasses.dataclass
class Traffic:
  """Of one kind of collective, a device."""

  count: int = 0  # how often it runs
  bytes: int = 0  # of the larger of what goes in and what comes out, summed over the runs
  largest: int = 0  # bytes of one run
  group: int = 0  # devices that take part in the largest one


@dataclasses.dataclass(frozen=True)
class _Instruction:
  opcode: str
  type: str
  rest: str


def collectives(text: str) -> dict[str, Traffic]:
  """Traffic by kind for what always runs, and by `conditional KIND` for what stands in a branch."""
  computations, entry = _parse(text)
  traffic: dict[str, Traffic] = collections.defaultdict(Traffic)
  for instruction, times, conditional in _walk(computations, entry, 1, False):
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
      continue
    size = _size(instruction)
    found = traffic[f"conditional {kind}" if conditional else kind]
    found.count += times
    found.bytes += times * size
    if size >= found.largest:
      found.largest, found.group = size, _group(instruction)
  return dict(traffic)


def most_rows(text: str, width: int) -> int:
  """Of the arrays that have a dimension of this width: the most that the other dimensions multiply to; 0 without one."""
  rows = 0
  for _, dims in set(_ARRAY.findall(text)):
    sizes = [int(size) for size in dims.split(",") if size]
    if width in sizes:
      rows = max(rows, math.prod(sizes) // width)
  return rows


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  computations: dict[str, list[_Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations[header["name"]] = []
      entry = header["name"] if header["entry"] else entry
    elif current is not None and (found := _INSTRUCTION.match(line)):
      current.append(_Instruction(found["opcode"], found["type"], found["rest"]))
  return computations, entry


def _walk(computations, name: str, times: int, conditional: bool) -> Iterator[tuple[_Instruction, int, bool]]:
  """Every instruction that a computation runs, how often, and whether only perhaps."""
  for instruction in computations.get(name, ()):
    yield instruction, times, conditional
    for branches in _BRANCHES.findall(instruction.rest):
      for branch in re.findall(r"[\w.\-]+", " ".join(branches)):
        yield from _walk(computations, branch, times, True)
    called = dict(_CALLED.findall(instruction.rest))
    if "body" in called:
      turns = _turns(computations.get(called["condition"], ()))
      yield from _walk(computations, called["body"], times * turns, conditional)
    elif instruction.opcode in ("fusion", "call", "async-start", "custom-call") and called:
      yield from _walk(computations, next(iter(called.values())), times, conditional)


def _turns(condition: list[_Instruction]) -> int:
  """How often a loop turns: the only constant of its condition; 1 where that is not a counted loop."""
  constants = {
    int(value) for one in condition if one.opcode == "constant" for value in _CONSTANT.findall(f"constant({one.rest}")
  }
  return max(constants, default=1) or 1


def _size(instruction: _Instruction) -> int:
  arrays = [_array_bytes(kind, dims) for kind, dims in _ARRAY.findall(instruction.type)]
  if instruction.opcode == "reduce-scatter":
    return max(arrays, default=0) * max(_group(instruction), 1)
  if instruction.opcode.endswith("-start"):  # (what goes in, what comes out, ...)
    return max(arrays, default=0)
  return sum(arrays)


def _array_bytes(kind: str, dims: str) -> int:
  size = _BYTES.get(kind, 0)
  for dim in filter(None, dims.split(",")):
    size *= int(dim)
  return size


def _group(instruction: _Instruction) -> int:
  found = _GROUPS.search(instruction.rest)
  if found is None:
    return 0
  return len(found[1].split(",")) if found[1] else int(found[2])
