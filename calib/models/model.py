"""One interface over SD3, FLUX and the shipped emoji model.

Everything is a function of explicit arguments; nothing here reads or sets global random state. Arrays are NHWC.
With guidance (``cfg_weight > 0``) the transformer sees a doubled batch: all conditional rows, then all
unconditional rows, in DiffusionKit's order.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import cast

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)
from calib.models.architecture import Architecture, Conditioning
from calib.models.clock import Clock

import mlx.core as mx
import numpy as np
from diffusionkit.mlx import LatentFormat
from diffusionkit.mlx.sampler import FluxSampler, ModelSamplingDiscreteFlow
from mlx import nn
from mlx.utils import tree_flatten

#: Prompts encoded ahead where the text encoders do not fit beside the transformer: about 300 MB with SD3 and T5.
ENCODE_AHEAD = 64
#: Prompts whose conditioning is kept, the empty one among them.
ROWS_KEPT = 64


class ModelDtype(StrEnum):
    """Weight and activation type of a transformer."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def mlx(self) -> mx.Dtype:
        return {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}[self.value]


@dataclass
class DiffusionModel:
    """A loaded text-to-image model.

    Attributes:
        name: the option of the ``model`` config group.
        architecture: the transformer whose layers are tapped and quantized, and what calib knows of it.
        encode_text: a text -> its conditioning, one row. Loads the text encoders where they are not loaded.
        decoder: the VAE's, which ``decode_latents`` calls.
        decode_latents: latents (batch, height, width, channels) after ``process_out`` -> images in about [-1, 1].
        dtype: activation type of the transformer.
        latent_shape: (height, width, channels) of one latent.
        text_length: length of a row of conditioning.
        token_count: tokens of a text, begin and end included, before anything is cut.
        max_prompt_tokens: tokens beyond this are cut by the text encoder.
        text_encoders: which ones, as 'clip_l+clip_g+t5': with other ones a prompt means something else.
        supports_guidance: False for FLUX, whose guidance is distilled: it takes ``cfg_weight=0`` only.
        unload_text: frees the text encoders; the next ``encode_text`` loads them again.
        text_bytes: memory of the text encoders while they are loaded.
        smaller_text: what to set for smaller text encoders, where that is possible.
        decoding_bytes: memory that decoding one latent takes; None: as DiffusionKit's VAE takes it.
        clock: told the timestep before every forward, where layers follow the step.
    """

    name: str
    architecture: Architecture
    sampler: ModelSamplingDiscreteFlow | FluxSampler
    latent_format: LatentFormat
    encode_text: Callable[[str], Conditioning]
    decoder: nn.Module
    decode_latents: Callable[[mx.array], mx.array]
    dtype: mx.Dtype
    latent_shape: tuple[int, int, int]
    text_length: int
    token_count: Callable[[str], int]
    max_prompt_tokens: int
    text_encoders: str
    supports_guidance: bool = True
    unload_text: Callable[[], None] = lambda: None
    text_bytes: int = 0
    smaller_text: str = ""
    decoding_bytes: int | None = None
    clock: Clock | None = None
    _fingerprint: str = field(default="", init=False, repr=False)
    _rows: dict[str, Conditioning] = field(default_factory=dict, init=False, repr=False)

    @property
    def transformer(self) -> nn.Module:
        """The network itself."""
        return self.architecture.module

    def encode(self, prompts: Sequence[str], cfg_weight: float) -> Conditioning:
        """Conditioning of a batch: all conditional rows, then with guidance as many unconditional ones.

        Each prompt is encoded by itself, so that a batch's make-up changes nothing, and once, as long as it is among
        the last few.
        """
        rows = {prompt: self._row(prompt) for prompt in dict.fromkeys(prompts)}
        parts = [rows[prompt] for prompt in prompts]
        if cfg_weight > 0:
            parts += [self._row("")] * len(prompts)
        return Conditioning.batch(parts)

    def encode_batches(
        self, batches: Sequence[Sequence[str]], cfg_weight: float, keep_text: bool
    ) -> Iterator[Conditioning]:
        """Conditioning of one batch after the other, as :meth:`encode` gives it.

        Unless ``keep_text``, many are encoded ahead and the text encoders unloaded before the first is given out.
        """
        ahead = 1 if keep_text or not batches else max(1, ENCODE_AHEAD // len(batches[0]))
        for first in range(0, len(batches), ahead):
            texts = [self.encode(prompts, cfg_weight) for prompts in batches[first : first + ahead]]
            if not keep_text:
                self.unload_text()
            yield from texts

    def _row(self, prompt: str) -> Conditioning:
        """One prompt's row in the transformer's type, evaluated."""
        if prompt in self._rows:
            self._rows[prompt] = row = self._rows.pop(prompt)
            return row
        row = self.encode_text(prompt).astype(self.dtype)
        mx.eval(row.arrays())
        self._rows[prompt] = row
        if len(self._rows) > ROWS_KEPT:
            del self._rows[next(iter(self._rows))]
        return row

    def velocity(self, x: mx.array, text: Conditioning, timestep: mx.array) -> mx.array:
        """The transformer's output v for ``x`` (rows, height, width, channels), in its own type.

        ``timestep`` is evaluated and of size 1, or holds one for each row, (rows,).
        """
        self.tell_clock(timestep)
        return self.architecture.velocity(x, text, timestep)

    def tell_clock(self, timestep: mx.array) -> None:
        """Announce a forward to layers that follow the step; rows of several steps have none in common."""
        if self.clock is not None:
            self.clock.tell(cast(float, timestep.item()) if timestep.size == 1 else None)

    def denoise(
        self, x: mx.array, timestep: mx.array, sigma: mx.array, text: Conditioning, cfg_weight: float
    ) -> mx.array:
        """Denoised estimate of ``x`` (batch, height, width, channels); DiffusionKit's ``CFGDenoiser``."""
        rows = (mx.concatenate([x, x]) if cfg_weight > 0 else x).astype(self.dtype)
        v = self.velocity(rows, text, timestep)
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
