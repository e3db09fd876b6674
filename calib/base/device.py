"""The device that this process computes on."""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx

Given = ParamSpec("Given")
Result = TypeVar("Result")


def on_gpu() -> bool:
    """Whether MLX computes on a GPU."""
    return bool(mx.default_device().type == mx.DeviceType.gpu)


def on_cuda() -> bool:
    """Whether that GPU is NVIDIA's."""
    return on_gpu() and bool(mx.cuda.is_available())


def on_metal() -> bool:
    """Whether that GPU is Apple's."""
    return on_gpu() and bool(mx.metal.is_available())


def device_kind() -> str:
    """'metal', 'cuda' or 'cpu'."""
    return "metal" if on_metal() else "cuda" if on_cuda() else "cpu"


def device_name() -> str:
    """Kind and name of MLX's default device."""
    return f"{device_kind()}: {mx.device_info().get('device_name', 'unknown')}"


def describe_device() -> dict[str, Any]:
    """Kind, number of processors, and what MLX reports of its default device."""
    return {"default": str(mx.default_device()), "kind": device_kind(), "cpus": os.cpu_count(), **mx.device_info()}


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compiled(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Fuse the elementwise operations of ``function``, of arrays alone, on a GPU.

    On a CPU it runs as it is: MLX would need a C++ compiler there.
    """
    fused = mx.compile(function)

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        result: Result = (fused if on_gpu() else function)(*args, **kwargs)
        return result

    return call
