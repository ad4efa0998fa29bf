"""Tokens and chat templates."""
