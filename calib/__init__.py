"""Time-aware calibration and post-training quantization of diffusion transformers on MLX.

Importing calib imports nothing else; on Linux it lets a fast BLAS be loaded before MLX, as :mod:`calib.base` says.
"""

from calib.base import VERSION as __version__

__all__ = ["__version__"]
