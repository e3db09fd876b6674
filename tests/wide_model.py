"""SD3's transformer in the emoji model's place, of any width, in a file: for ``model._target_``."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from calib.models import emoji
from calib.models.memory import preflight
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import DiffusionModel, ModelDtype, weights
from calib.models.placed import placed
from calib.models.small import config_of

import mlx.core as mx
from diffusionkit.mlx.mmdit import MMDiT


def transformer(width: int, depth: int) -> MMDiT:
    """Without weights; of ``depth`` blocks."""
    return MMDiT(replace(config_of("sd3"), hidden_size_override=width, num_heads=width // 64, depth_multimodal=depth))


def write(file: Path, width: int, depth: int) -> int:
    """Random weights in float16, block by block; returns their bytes in float32."""
    mx.random.seed(0)
    own = {}
    for path, weight in weights(transformer(width, depth)).items():
        scale = 0.5 * weight.shape[-1] ** -0.5
        own[path] = mx.ones(weight.shape, mx.float16) if "norm" in path else scale * mx.random.normal(weight.shape)
    mx.save_safetensors(str(file), {path: weight.astype(mx.float16) for path, weight in own.items()})
    return sum(4 * weight.size for weight in own.values())


def load(
    name: str,
    shift: float,
    image_size: Sequence[int],
    file: str,
    width: int,
    depth: int,
    stream: bool | None = None,
) -> DiffusionModel:
    """The emoji model with such a transformer, in float32: it draws noise."""
    architecture = MMDiTArchitecture(transformer(width, depth))
    preflight(name, architecture.module, ModelDtype.FLOAT32, stream)
    model = replace(emoji.load(image_size=image_size), name=name, architecture=architecture)
    return placed(model, lambda: dict(mx.load(file)), file, stream)
