"""Batches, losses, the optimizer, and the loops of SFT, DPO, RL and reward models."""
