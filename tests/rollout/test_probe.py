"""An engine that decodes with other weights than the trainer's is found before it decodes."""

from tests.devices import run_on_devices


def test_wrong_weights_are_named():
  run_on_devices(4, "tests.rollout.probe_cases:wrong_weights_are_named")
