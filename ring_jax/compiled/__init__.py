"""A run's programs compiled for devices that are not here, and what they would need."""
