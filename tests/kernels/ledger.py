"""The ledger of static bundle counts, bundles.json: how many instruction words each kernel is on each chip.

    python -m tests.kernels.ledger              compiles everything and writes the file (minutes)
    python -m tests.kernels.ledger v5p          one chip

test_ledger.py fails if a kernel has grown by more than 3%.  A count is of code, not of time: see compiled.py.
"""

import json
import pathlib
import sys

from sharding.hardware import CHIPS
from tests.kernels.compiled import bundles

FILE = pathlib.Path(__file__).with_name("bundles.json")

# By the prefix of their names: the function, called with a chip, that compiles these kernels.
PROGRAMS = {
  "linear_logprob": "tests.kernels.tpu_programs:linear_logprob",
  "linear_sample": "tests.kernels.tpu_programs:linear_sample",
}


def measure(prefix: str, chip: str) -> dict[str, int]:
  """Bundles of the kernels whose names start with the prefix."""
  counts = bundles(PROGRAMS[prefix], chip)
  return {name: count["bundles"] for name, count in sorted(counts.items()) if name.startswith(prefix)}


def main() -> None:
  stored = json.loads(FILE.read_text()) if FILE.exists() else {}
  for chip in sys.argv[1:] or CHIPS:
    stored[chip] = {}
    for prefix in PROGRAMS:
      stored[chip] |= measure(prefix, chip)
    print(chip, stored[chip])
  FILE.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
  main()
