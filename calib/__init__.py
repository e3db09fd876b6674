"""Time-aware calibration and post-training quantization of diffusion transformers on MLX."""

# Importing calib.blas loads a fast BLAS on Linux; it must come before anything that imports mlx.core.
from calib import blas

__version__ = "0.1.0"
__all__ = ["__version__", "blas"]
