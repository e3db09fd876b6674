"""A loaded text-to-image model of any family.

Everything is a function of explicit arguments; nothing here reads or sets global random state. Arrays are NHWC.
With classifier-free guidance (``cfg_weight > 0``) the transformer gets a doubled batch: all conditional rows, then all
unconditional rows, in DiffusionKit's order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias, cast

from calib.base import blas, heap
from calib.base.device import on_gpu
from calib.base.progress import note
from calib.models.architecture import Architecture, Conditioning
from calib.models.clock import Clock
from calib.models.encoding import Encoding
from calib.models.noise import Flow, LatentFormat, Sampler, UnscaledLatents
from calib.models.parallel import parts_of, streams_of
from calib.models.streamed import Streamed, of_rows
from calib.models.tensors import fingerprint_of

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray


class ModelDtype(StrEnum):
    """Weight and activation type of a transformer."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def mlx(self) -> mx.Dtype:
        return {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}[self.value]


#: Combines outputs for a text and without it, (rows, height, width, channels) each, by the weight of guidance.
Guidance: TypeAlias = Callable[[mx.array, mx.array, float], mx.array]


def guided(conditional: mx.array, unconditional: mx.array, cfg_weight: float) -> mx.array:
    """Classifier-free guidance."""
    return unconditional + cfg_weight * (conditional - unconditional)


@dataclass
class DiffusionModel(Encoding):
    """A loaded text-to-image model.

    Attributes:
        name: the option of the ``model`` config group.
        architecture: the transformer whose layers are tapped and quantized.
        sampler: DiffusionKit's or one with its members, or a :class:`~calib.models.noise.Flow`.
        encode_text: a text -> its conditioning, one row. Loads the text encoders unless they are loaded.
        decoder: the VAE's decoder, which ``decode_latents`` calls.
        decode_latents: latents (batch, height, width, channels) after ``process_out`` -> images in about [-1, 1].
        draw_latents: the same in less memory, through which no gradient can pass; None: ``decode_latents`` draws.
        dtype: activation type of the transformer.
        latent_shape: (height, width, channels) of one latent.
        text_length: tokens in a row of conditioning, at most where texts differ in it.
        token_count: a text -> its number of tokens, begin and end included, before truncation.
        max_prompt_tokens: number of tokens beyond which the text encoder truncates.
        text_encoders: names of the text encoders, e.g. 'clip_l+clip_g+t5'; conditioning depends on them.
        latent_format: its ``process_out`` scales latents from the transformer's to the decoder's.
        supports_guidance: False for FLUX, whose guidance is distilled: ``cfg_weight`` must be 0.
        guidance: how the outputs of both halves are combined where there is guidance.
        unload_text: frees the text encoders; the next ``encode_text`` loads them again.
        text_bytes: memory of the loaded text encoders, bytes.
        smaller_text: the setting that makes room for the text encoders; empty where there is none.
        decoding_bytes: memory of decoding one latent, bytes; None: estimated where the decoder has the layers of
            DiffusionKit's VAE, else not counted.
        clock: set before every forward pass where layers depend on the denoising step.
    """

    name: str
    architecture: Architecture
    sampler: Sampler | Flow
    encode_text: Callable[[str], Conditioning]
    decoder: nn.Module
    decode_latents: Callable[[mx.array], mx.array]
    dtype: mx.Dtype
    latent_shape: tuple[int, int, int]
    text_length: int
    token_count: Callable[[str], int]
    max_prompt_tokens: int
    text_encoders: str
    latent_format: LatentFormat = field(default_factory=UnscaledLatents)
    supports_guidance: bool = True
    guidance: Guidance = guided
    unload_text: Callable[[], None] = lambda: None
    text_bytes: int = 0
    smaller_text: str = ""
    decoding_bytes: int | None = None
    draw_latents: Callable[[mx.array], mx.array] | None = None
    clock: Clock | None = None
    _fingerprint: str = field(default="", init=False, repr=False)
    _rows: dict[str, Conditioning] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Prepare a CPU, and say so where products will be slow for want of a BLAS: whoever computes has a model."""
        if not on_gpu():
            heap.keep_freed(much=self.streamed is None)
            if (slow := blas.slow()) is not None:
                note(slow)

    @property
    def transformer(self) -> nn.Module:
        """The transformer's network."""
        return self.architecture.module

    @property
    def streamed(self) -> Streamed | None:
        """The transformer where it is streamed from its checkpoint; None where it is in memory."""
        return self.architecture if isinstance(self.architecture, Streamed) else None

    def layers(self) -> Mapping[str, nn.Module]:
        """Every linear layer by name; of a streamed model best used one after the other."""
        layers = self.architecture.layers()
        return layers if self.streamed is None else self.streamed.in_turn(layers)

    @property
    def flow(self) -> Flow | None:
        """The sampler where it is a :class:`~calib.models.noise.Flow`; None where it is of DiffusionKit's kind."""
        return self.sampler if isinstance(self.sampler, Flow) else None

    @property
    def time_dtype(self) -> mx.Dtype:
        """The type in which the transformer is given timesteps."""
        return self.dtype if self.flow is None else mx.float32

    def timesteps(self, levels: mx.array) -> mx.array:
        """What the transformer takes for noise levels: 1000 sigma in its own type, as in DiffusionKit, or a flow's."""
        return (levels * 1000).astype(self.dtype) if self.flow is None else self.flow.timesteps(levels)

    def velocity(self, x: mx.array, text: Conditioning, timestep: float | mx.array) -> mx.array:
        """The transformer's output v for ``x`` (rows, height, width, channels), in its own type.

        ``timestep`` is a number; or evaluated and of size 1; or one for each row, (rows,).
        """
        self.set_clock(timestep)
        times = timestep if isinstance(timestep, mx.array) else mx.array(timestep, self.time_dtype)
        return self.architecture.velocity(x, text, times)

    def velocities(
        self,
        x: mx.array,
        text: Conditioning,
        timestep: float | mx.array,
        parts: Sequence[slice],
        entering: Callable[[slice], None] = lambda part: None,
    ) -> list[mx.array]:
        """:meth:`velocity` for ``parts`` of the rows, each on a stream of its own; lazy unless the model is streamed.

        Args:
            entering: called before operations of a part are built: once, or where the model is streamed several times.

        Raises:
            ValueError: there are more or fewer rows of text.
        """
        if len(text.tokens) != len(x):
            raise ValueError(f"{len(x)} rows of states and {len(text.tokens)} of text")
        if self.streamed is not None:
            self.set_clock(timestep)
            times = timestep if isinstance(timestep, mx.array) else mx.array(timestep, self.time_dtype)
            return self.streamed.velocities(x, text, times, parts, entering)
        outputs = []
        for part, stream in zip(parts, streams_of(len(parts)), strict=True):
            with mx.stream(stream):
                entering(part)
                own = of_rows(timestep, part) if isinstance(timestep, mx.array) else timestep
                outputs.append(self.velocity(x[part], text[part], own))
        return outputs

    def set_clock(self, timestep: float | mx.array) -> None:
        """Set the clock for layers that depend on the step; to None where rows differ in timestep.

        A number is best: reading an array waits for the device.
        """
        if self.clock is not None:
            if isinstance(timestep, mx.array):
                self.clock.set_timestep(cast(float, timestep.item()) if timestep.size == 1 else None)
            else:
                self.clock.set_timestep(timestep)

    def denoise(
        self,
        x: mx.array,
        timestep: float | mx.array,
        sigma: mx.array,
        text: Conditioning,
        cfg_weight: float,
        parts: int = 1,
    ) -> mx.array:
        """Denoised estimate of ``x`` (batch, height, width, channels), as in DiffusionKit's ``CFGDenoiser``.

        On a CPU ``parts`` of the rows are computed side by side, and started at once.
        """
        assert not isinstance(self.sampler, Flow)
        rows, v = self._outputs(x, timestep, text, cfg_weight, parts)
        return self.guided(self.sampler.calculate_denoised(sigma, v, rows), cfg_weight)

    def guided_velocity(
        self, x: mx.array, timestep: float, text: Conditioning, cfg_weight: float, parts: int = 1
    ) -> mx.array:
        """The guided output for ``x`` (batch, height, width, channels); arguments are those of :meth:`denoise`."""
        return self.guided(self._outputs(x, timestep, text, cfg_weight, parts)[1], cfg_weight)

    def guided(self, rows: mx.array, cfg_weight: float) -> mx.array:
        """Outputs of ``rows``, conditional ones first, combined; without guidance ``rows`` themselves."""
        if cfg_weight <= 0:
            return rows
        conditional, unconditional = mx.split(rows, 2)
        return self.guidance(conditional, unconditional, cfg_weight)

    def _outputs(
        self, x: mx.array, timestep: float | mx.array, text: Conditioning, cfg_weight: float, parts: int
    ) -> tuple[mx.array, mx.array]:
        """The rows that the transformer gets for ``x``, with guidance twice as many, and its output for them."""
        rows = (mx.concatenate([x, x]) if cfg_weight > 0 else x).astype(self.dtype)
        outputs = self.velocities(rows, text, timestep, parts_of(len(rows), parts))
        if len(outputs) == 1:
            return rows, outputs[0]
        mx.async_eval(outputs)  # all at once: see by_parts
        return rows, mx.concatenate(outputs)

    def decode(self, x: mx.array) -> mx.array:
        """Images (batch, height, width, 3) in [0, 1] of the sampler's final latents ``x``, in float32.

        NumPy has no bfloat16, whose steps near 1 are also as wide as those of 8-bit pixels.
        """
        draw = self.draw_latents or self.decode_latents
        image = draw(self.latent_format.process_out(x).astype(self.dtype))
        return mx.clip(image.astype(mx.float32) / 2 + 0.5, 0, 1)

    def decode_each(self, x: mx.array, at_once: int = 1) -> NDArray[np.float32]:
        """Images of latents ``x``, as :meth:`decode` gives them one by one; ``at_once`` of them side by side on a CPU.

        One by one, as at full resolution the decoder needs more memory than the transformer.
        """
        found: list[NDArray[np.float32]] = []
        for first in range(0, len(x), at_once):
            images = []
            for i, stream in zip(range(first, min(first + at_once, len(x))), streams_of(at_once), strict=False):
                with mx.stream(stream):
                    images.append(self.decode(x[i : i + 1]))
            mx.async_eval(images)
            found += [np.array(image) for image in images]
        return np.concatenate(found)

    @property
    def fingerprint(self) -> str:
        """Hash of the transformer's weights: names, shapes, types and bytes (16 hex digits)."""
        if not self._fingerprint:
            streamed = self.streamed
            self._fingerprint = weights_fingerprint(self.transformer) if streamed is None else streamed.fingerprint()
        return self._fingerprint

    @contextmanager
    def changed(self, change: Callable[[str, mx.array], mx.array]) -> Iterator[None]:
        """Compute with ``change(path, weight)`` in place of every weight of the transformer, in the context; lazy."""
        streamed, own = self.streamed, weights(self.transformer)
        own = own if streamed is None else streamed.staying(own)
        try:
            self.transformer.update(tree_unflatten([(path, change(path, weight)) for path, weight in own.items()]))
            with nullcontext() if streamed is None else streamed.changed(change):
                yield
        finally:
            self.transformer.update(tree_unflatten(list(own.items())))


def weights(module: nn.Module) -> dict[str, mx.array]:
    """Parameters by path, without the table that FLUX's RoPE stores as an attribute and MLX takes for a parameter."""
    parameters = dict(tree_flatten(module.parameters()))
    return {path: value for path, value in parameters.items() if not path.startswith("pre_sdpa_rope.")}


def weights_fingerprint(module: nn.Module) -> str:
    """Hash of all parameters of ``module`` in the order of their names (16 hex digits of SHA-256)."""
    return fingerprint_of(sorted(weights(module).items()))
