"""Time-aware calibration and post-training quantization of diffusion transformers on MLX.

Importing calib imports nothing else. On Linux it arranges for a fast BLAS to be loaded before MLX, whoever imports MLX
first; :mod:`calib.base.blas` explains why.
"""

import sys

from calib.base import VERSION as __version__

__all__ = ["__version__"]


class _BlasBeforeMlx:
    """A finder of modules that finds none; it loads the BLAS that MLX will bind to when MLX is first looked for."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "mlx":
            from calib.base import blas

            blas.status()


if "mlx" not in sys.modules:
    sys.meta_path.insert(0, _BlasBeforeMlx())
