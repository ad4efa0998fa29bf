"""The run directory: stages, records, checkpoints, metrics."""
