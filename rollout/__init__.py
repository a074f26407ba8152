"""Engine, sampling, C3PO++ scheduler, driver and simulator."""
