"""From prompts to responses, and from responses to log-probabilities."""
