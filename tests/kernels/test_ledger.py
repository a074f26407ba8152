"""No kernel's code grows unnoticed: the compiler's counts against the ledger."""

import json

import pytest

from sharding.hardware import CHIPS
from tests.kernels import ledger


@pytest.mark.tpu_full
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("prefix", ledger.PROGRAMS)
def test_no_kernel_has_grown(prefix, chip):
  stored = json.loads(ledger.FILE.read_text())[chip]
  counts = ledger.measure(prefix, chip)
  assert counts.keys() == {name for name in stored if name.startswith(prefix)}
  grown = {name: (stored[name], count) for name, count in counts.items() if count > 1.03 * stored[name]}
  assert not grown, f"{grown}: if that is meant, python -m tests.kernels.ledger"


def test_the_ledger_is_complete():
  stored = json.loads(ledger.FILE.read_text())
  assert stored.keys() == CHIPS.keys()
  for counts in stored.values():
    assert counts.keys() == stored["v5p"].keys() and all(count > 100 for count in counts.values())
    for prefix in ledger.PROGRAMS:
      assert any(name.startswith(prefix) for name in counts), prefix
