"""The embedded world: tasks with exact grades, their annotators, the seed model's corpus and its vocabulary."""
