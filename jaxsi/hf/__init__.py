"""Hugging Face files in and out."""
