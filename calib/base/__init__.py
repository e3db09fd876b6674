"""What every other room builds on: errors, files, progress, versions. Only ``device`` imports MLX.

Importing it imports nothing else. On Linux it arranges for a fast BLAS to be loaded before MLX, whoever imports MLX
first; :mod:`calib.base.blas` explains why. It is done here as ``calib/__init__`` does not run where Python takes the
folder of a checkout, named calib, for a namespace package: beside a script, with an editable installation.
"""

import sys

VERSION = "0.3.0"


class _BlasBeforeMlx:
    """A finder of modules that finds none; it loads the BLAS that MLX will bind to when MLX is first looked for."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == "mlx.core":
            from calib.base import blas

            blas.status()


if "mlx.core" not in sys.modules:
    sys.meta_path.insert(0, _BlasBeforeMlx())
