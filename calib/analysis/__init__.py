"""Make a plan from statistics: bit-widths, clipping and activation ranges of every layer."""

import calib.base  # noqa: F401 (before MLX, also where calib/__init__ did not run)
