"""Time-aware calibration and post-training quantization of diffusion transformers on MLX.

Importing calib takes nothing but this file. On Linux it sees to it that a fast BLAS is loaded before MLX is, whoever
imports MLX first: :mod:`calib.base.blas` says why.
"""

import sys
from importlib.abc import MetaPathFinder
from typing import Any

__version__ = "0.1.0"


class _BlasBeforeMlx(MetaPathFinder):
    """Finds nothing; the first time that anybody looks for MLX it loads the BLAS that MLX will bind to."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name == "mlx":
            sys.meta_path.remove(self)
            from calib.base import blas

            blas.status()


if "mlx" not in sys.modules:
    sys.meta_path.insert(0, _BlasBeforeMlx())
