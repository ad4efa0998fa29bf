"""Planning a run for hardware that is not here, and measuring the hardware that is."""
