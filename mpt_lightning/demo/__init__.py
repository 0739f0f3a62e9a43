"""The embedded default: a small generated world of tasks, and a small T5 pretrained on it."""
