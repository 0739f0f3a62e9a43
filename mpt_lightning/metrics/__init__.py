"""Metrics by the names on a card: a light registry of names, and `TaskMetrics`, which computes them."""
