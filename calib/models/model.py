"""One interface over SD3, FLUX and the shipped emoji model.

Everything is a function of explicit arguments; nothing here reads or sets global random state. Arrays are NHWC.
With guidance (``cfg_weight > 0``) the transformer sees a doubled batch: all conditional rows, then all
unconditional rows, in DiffusionKit's order.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)
from calib.models.modulation import velocity

import mlx.core as mx
import numpy as np
from diffusionkit.mlx import LatentFormat
from diffusionkit.mlx.mmdit import MMDiT
from diffusionkit.mlx.sampler import FluxSampler, ModelSamplingDiscreteFlow
from mlx import nn
from mlx.utils import tree_flatten


class ModelDtype(StrEnum):
    """Weight and activation type of a transformer."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def mlx(self) -> mx.Dtype:
        return {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}[self.value]


@dataclass(frozen=True)
class Conditioning:
    """Encoded text of a batch: ``tokens`` (rows, length, width) and ``pooled`` (rows, width)."""

    tokens: mx.array
    pooled: mx.array

    @classmethod
    def batch(cls, prompts: Sequence["Conditioning"]) -> "Conditioning":
        """Join single prompts (one row each, or a conditional and an unconditional one) into a batch."""
        rows = prompts[0].tokens.shape[0]
        tokens = [prompt.tokens[i : i + 1] for i in range(rows) for prompt in prompts]
        pooled = [prompt.pooled[i : i + 1] for i in range(rows) for prompt in prompts]
        return cls(mx.concatenate(tokens), mx.concatenate(pooled))


@dataclass
class DiffusionModel:
    """A loaded text-to-image model.

    Attributes:
        name: the option of the ``model`` config group.
        transformer: the MMDiT whose layers are tapped and quantized.
        encode_text: (prompt, cfg_weight) -> conditioning of one row, or of two rows with guidance.
        decode_latents: latents (batch, height, width, channels) after ``process_out`` -> images in about [-1, 1].
        dtype: activation type of the transformer.
        latent_shape: (height, width, channels) of one latent.
        supports_guidance: False for FLUX, whose guidance is distilled: it takes ``cfg_weight=0`` only.
        max_prompt_tokens: tokens of a prompt beyond this are cut by the text encoder.
    """

    name: str
    transformer: MMDiT
    sampler: ModelSamplingDiscreteFlow | FluxSampler
    latent_format: LatentFormat
    encode_text: Callable[[str, float], Conditioning]
    decode_latents: Callable[[mx.array], mx.array]
    dtype: mx.Dtype
    latent_shape: tuple[int, int, int]
    supports_guidance: bool = True
    _fingerprint: str = field(default="", repr=False)

    def encode(self, prompts: Sequence[str], cfg_weight: float) -> Conditioning:
        """Conditioning of a batch of prompts, each encoded by itself, so that a batch's make-up changes nothing."""
        parts = []
        for prompt in prompts:
            one = self.encode_text(prompt, cfg_weight)
            part = Conditioning(one.tokens.astype(self.dtype), one.pooled.astype(self.dtype))
            mx.eval(part.tokens, part.pooled)
            parts.append(part)
        return Conditioning.batch(parts)

    def denoise(
        self, x: mx.array, timestep: mx.array, sigma: mx.array, text: Conditioning, cfg_weight: float
    ) -> mx.array:
        """Denoised estimate of ``x`` (batch, height, width, channels); DiffusionKit's ``CFGDenoiser``."""
        rows = (mx.concatenate([x, x]) if cfg_weight > 0 else x).astype(self.dtype)
        v = velocity(self.transformer, rows, text.tokens, text.pooled, timestep)
        denoised: mx.array = self.sampler.calculate_denoised(sigma, v, rows)
        if cfg_weight <= 0:
            return denoised
        conditional, unconditional = mx.split(denoised, 2)
        return unconditional + cfg_weight * (conditional - unconditional)

    def decode(self, x: mx.array) -> mx.array:
        """Images (batch, height, width, 3) in [0, 1] of final latents as the sampler leaves them."""
        image = self.decode_latents(self.latent_format.process_out(x).astype(self.dtype))
        return mx.clip(image / 2 + 0.5, 0, 1)

    @property
    def fingerprint(self) -> str:
        """Hash of the transformer's weights: names, shapes, types and bytes (16 hex digits)."""
        if not self._fingerprint:
            self._fingerprint = weights_fingerprint(self.transformer)
        return self._fingerprint


def weights(module: nn.Module) -> dict[str, mx.array]:
    """Parameters by path, less the table that FLUX's RoPE keeps as an attribute and MLX takes for a parameter."""
    parameters = dict(tree_flatten(module.parameters()))
    return {path: value for path, value in parameters.items() if not path.startswith("pre_sdpa_rope.")}


def weights_fingerprint(module: nn.Module) -> str:
    """Hash of all parameters of ``module`` in the order of their names (16 hex digits of SHA-256)."""
    digest = hashlib.sha256()
    for name, value in sorted(weights(module).items()):
        digest.update(f"{name}{value.shape}{value.dtype}".encode())
        digest.update(np.ascontiguousarray(np.array(value.view(mx.uint8))).data)
    return digest.hexdigest()[:16]
