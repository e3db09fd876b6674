"""Import DiffusionKit 0.5.2, unmodified, on current MLX and without torch.

DiffusionKit's MLX part asks at import for three names of ``argmaxtools`` (a logger and two mix-ins of its
command-line report) and, through ``diffusionkit.utils``, for torch. Neither does any work in the model code.
Where the real packages are missing this module puts small stand-ins in ``sys.modules``; where they are
installed they are used. Its T5 encoder also reads Metal's memory size, which MLX on Linux does not know.

Import the submodules of ``diffusionkit.mlx`` only after ``import calib.models.compat``.
"""

import importlib.util
import logging
import os
import sys
from types import ModuleType
from typing import Any

import mlx.core as mx


def _missing(package: str) -> bool:
    return package not in sys.modules and importlib.util.find_spec(package) is None


def _supply_argmaxtools() -> None:
    package = ModuleType("argmaxtools")
    utils = ModuleType("argmaxtools.utils")
    test_utils = ModuleType("argmaxtools.test_utils")
    vars(utils)["get_logger"] = logging.getLogger
    # DiffusionKitInferenceContext inherits from these two; only generate_image(verbose=True) makes one.
    vars(test_utils)["AppleSiliconContextMixin"] = type("AppleSiliconContextMixin", (), {})
    vars(test_utils)["InferenceContextSpec"] = type("InferenceContextSpec", (), {})
    sys.modules["argmaxtools"] = package
    sys.modules["argmaxtools.utils"] = utils
    sys.modules["argmaxtools.test_utils"] = test_utils


def _supply_utils() -> None:
    utils = ModuleType("diffusionkit.utils")
    vars(utils)["bytes2gigabytes"] = lambda n: n / 1024**3
    sys.modules["diffusionkit.utils"] = utils


def _supply_metal_memory_size() -> None:
    """T5 sets the memory limit in every forward, to what Metal's device information says: here to what it is.

    The functions it calls are also deprecated names, of which MLX says so on the terminal each time.
    """

    def device_info() -> dict[str, Any]:
        return {**mx.device_info(), "memory_size": mx.get_memory_limit()}

    mx.metal.device_info = device_info
    mx.metal.set_memory_limit = mx.set_memory_limit


if _missing("argmaxtools"):
    _supply_argmaxtools()
if _missing("torch"):
    _supply_utils()
_supply_metal_memory_size()

# transformers, imported by DiffusionKit for T5's configuration, warns that torch is absent: that is intended here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
logging.getLogger("transformers").setLevel(logging.ERROR)
