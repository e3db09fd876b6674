"""Import DiffusionKit 0.5.2, unmodified, on current MLX and without torch.

At import DiffusionKit's MLX part needs three names of ``argmaxtools`` (a logger and two mix-ins of its command-line
report) and, through ``diffusionkit.utils``, torch. The model code uses neither. This module puts small stand-ins in
``sys.modules`` where the real packages are missing. DiffusionKit's T5 encoder also reads Metal's memory size, which
MLX does not report on Linux.

Three packages that DiffusionKit imports take longer than all the rest of a job's imports: transformers and
huggingface_hub, which it calls only for T5 and for downloads, and beartype, whose ``typing`` is Python's own. Here
they are deferred: DiffusionKit gets their names at once, and the packages are imported when a name is first used.

Import the submodules of ``diffusionkit.mlx`` only after ``import calib.models.compat``.
"""

import importlib
import importlib.util
import logging
import os
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
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
    """Make T5, which sets the memory limit to Metal's memory size in every forward, keep the limit as it is.

    Its functions are also called by deprecated names, for which MLX prints a warning every time.
    """

    def device_info() -> dict[str, Any]:
        return {**mx.device_info(), "memory_size": mx.get_memory_limit()}

    mx.metal.device_info = device_info
    mx.metal.set_memory_limit = mx.set_memory_limit


class _Deferred:
    """The member ``name`` of a module that is imported when the member is first called or looked into."""

    def __init__(self, module: str, name: str):
        self._module, self._name = module, name

    def _imported(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._imported()(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._imported(), name)


class _DeferredModule(ModuleType):
    """A stand-in for the module of the same name, each of whose members is deferred while DiffusionKit is imported.

    Later it gives the real ones: another thread may have imported the package meanwhile.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's questions
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            return _Deferred(self.__name__, name)
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def _deferring() -> Iterator[None]:
    """Replace slow packages that are not imported yet by stand-ins, for the time of the context."""
    stand_ins = {name: _DeferredModule(name) for name in ("transformers", "huggingface_hub")}
    supplied = {n: m for n, m in {**stand_ins, "beartype.typing": typing}.items() if n not in sys.modules}
    sys.modules.update(supplied)
    try:
        yield
    finally:
        for name in supplied:
            del sys.modules[name]


if _missing("argmaxtools"):
    _supply_argmaxtools()
if _missing("torch"):
    _supply_utils()
_supply_metal_memory_size()
with _deferring():
    importlib.import_module("diffusionkit.mlx")

# transformers, which T5's configuration and tokenizer come from, warns that torch is absent: that is intended here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
logging.getLogger("transformers").setLevel(logging.ERROR)
