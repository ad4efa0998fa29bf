"""The decoder, and nothing else."""
