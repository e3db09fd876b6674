"""Observing a transformer's activations: taps, exact streaming statistics, and the file they are kept in."""
