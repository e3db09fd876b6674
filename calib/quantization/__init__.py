"""Quantizers, applying a plan to a model, inference that follows the step, and quantized models on disk."""
