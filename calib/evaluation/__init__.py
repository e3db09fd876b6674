"""What quantization costs: paired fidelity against the full-precision model."""
