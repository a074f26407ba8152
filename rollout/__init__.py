"""Engine, sampling, C3PO++ scheduler and driver."""
