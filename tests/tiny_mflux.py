"""What the small models of mflux's families have in common: random weights, random texts, their place in calib."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calib.models.architecture import Architecture, Conditioning
from calib.models.mflux.family import Family
from calib.models.model import DiffusionModel, weights

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_map
from standin_mflux import Sizes, random_weight


@dataclass(frozen=True)
class Tiny:
    """A small model of a family.

    Attributes:
        option: the ``model`` option that loads it; width: of its text's tokens.
        told: whether its transformer is told a weight of guidance.
        pooled: width of its pooled text; None where it has none.
        varying: whether texts keep their own number of tokens.
        patched: puts its sizes where mflux has its own in its code; write: writes its files.
        mfluxs: mflux's own model of a folder; unpacked: its latents of a step as (height, width, channels).
        decoded: its decoder's pictures of such latents.
    """

    option: str
    family: Family
    sizes: Sizes
    width: int
    varying: bool
    patched: Callable[[pytest.MonkeyPatch], None]
    write: Callable[[Path, mx.Dtype], None]
    mfluxs: Callable[[Path], Any]
    unpacked: Callable[[mx.array, tuple[int, int]], mx.array]
    decoded: Callable[[Any, mx.array, tuple[int, int]], mx.array]
    told: bool = False
    pooled: int | None = None

    def architecture(self, dtype: mx.Dtype = mx.float32) -> Architecture:
        own = self.family.architecture(dict(self.sizes.transformer))
        mx.random.seed(0)
        fill(own.module, dtype)
        return own

    def model(self, model: DiffusionModel, dtype: mx.Dtype = mx.float32) -> DiffusionModel:
        """The emoji ``model`` with such a transformer and mflux's sampler, of 8 by 8 tokens; no text encoder."""
        side, channels = self.family.latent
        size = (128, 128)
        return replace(
            model,
            name=f"tiny_{self.option}",
            architecture=self.architecture(dtype),
            sampler=self.family.flow(size, dtype),
            encode_text=self.encode_text,
            token_count=self.length_of,
            text_length=128,
            max_prompt_tokens=128,
            latent_shape=(size[0] // side, size[1] // side, channels),
            dtype=self.family.activations or dtype,
            supports_guidance=self.family.guidance is not None,
            guidance=self.family.guidance or model.guidance,
        )

    def encode_text(self, text: str) -> Conditioning:
        """Random tokens, four for each letter where texts keep their number: of other lengths, once padded, too."""
        return self.conditioning(self.length_of(text), zlib.crc32(text.encode()))

    def conditioning(self, length: int, seed: int) -> Conditioning:
        """That of a text of ``length`` tokens, random."""
        random = np.random.RandomState(seed)
        tokens = mx.array(random.randn(1, length, self.width).astype(np.float32))
        pooled = None if self.pooled is None else mx.array(random.randn(1, self.pooled).astype(np.float32))
        return Conditioning(tokens, pooled, (length,) if self.varying else None)

    def length_of(self, text: str) -> int:
        return 4 * len(text) + 1 if self.varying else 24


def fill(module: nn.Module, dtype: mx.Dtype) -> None:
    """Random weights, by the seed that is set."""
    for path, weight in weights(module).items():
        module.load_weights([(path, random_weight(path, weight.shape).astype(dtype))], strict=False)
    mx.eval(module.parameters())


def names_alone(module: nn.Module) -> None:
    """Leave only the names of a module's weights: what is never used takes no room."""
    module.update(tree_map(lambda w: mx.zeros([1] * w.ndim), module.parameters()))


def smaller(patch: pytest.MonkeyPatch, initializer: Any, sizes: Mapping[str, Mapping[str, Any]]) -> None:
    """Put these ``sizes``, by class, in the place of those that mflux's ``initializer`` passes."""
    for name, own in sizes.items():
        made = getattr(initializer, name)
        patch.setattr(initializer, name, lambda made=made, own=own, **_: made(**own))
