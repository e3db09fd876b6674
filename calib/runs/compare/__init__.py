"""Comparisons of runs: by configuration and metrics, and by plan, as tables."""
