"""The suites of `parity.run`: each module has `run(quick=True) -> Suite`."""
