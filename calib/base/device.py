"""The device that this process computes on."""

import os
from typing import Any

import mlx.core as mx


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
