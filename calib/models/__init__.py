"""Models: DiffusionKit's SD3 and FLUX and the shipped emoji model, behind one interface."""

import calib.base  # noqa: F401 (before MLX, also where calib/__init__ did not run)
