"""Observe a transformer's activations: taps, exact streaming statistics, and the file that stores them."""
