"""Prompts to responses, and responses to log-probabilities."""
