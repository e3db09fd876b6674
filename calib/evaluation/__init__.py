"""Measure the effect of quantization: paired fidelity against the full-precision model."""
