"""DiffusionKit's MMDiT as an :class:`~calib.models.architecture.Architecture`: SD3, FLUX, and the emoji model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from enum import Enum
from typing import Any

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)
from calib.models.architecture import Conditioning, Part, Producer, Site
from calib.models.gelu import with_fast_gelu
from calib.models.mmdit import resume
from calib.models.mmdit.modulation import modulated
from calib.models.mmdit.names import layer_name, module_path, network_order
from calib.models.mmdit.parts import parts_of

import mlx.core as mx
from diffusionkit.mlx.mmdit import MMDiT, TransformerBlock
from mlx import nn

#: Kind of a layer's input, by the suffix of its name.
KINDS = {
    "attn.q_proj": "modulated",
    "attn.k_proj": "modulated",
    "attn.v_proj": "modulated",
    "mlp.fc1": "modulated",
    "final_layer.linear": "modulated",
    "attn.o_proj": "post-attention",
    "mlp.fc2": "post-gelu",
    "adaln": "post-silu",
    "embedder.2": "post-silu",
}


class MMDiTArchitecture:
    """A DiffusionKit MMDiT, ``module``; resumable, divisible, and smoothable before its linear layers."""

    input_layer = "x_embedder"

    def __init__(self, module: MMDiT):
        self.module = module
        config = module.config
        self.depth = (int(config.depth_multimodal), int(config.depth_unified))
        self.width, self.heads = int(config.hidden_size), int(config.num_heads)
        # FLUX's RoPE keeps its table as an attribute, which MLX takes for a parameter: no gradient is to reach it.
        module.pre_sdpa_rope.freeze(keys=["rope_embeddings"])
        with_fast_gelu(module)

    def velocity(self, x: mx.array, text: Conditioning, timestep: mx.array) -> mx.array:
        return self._forward(x, text, timestep)

    def velocity_after(
        self, block: int, output: resume.Output, x: mx.array, text: Conditioning, timestep: mx.array
    ) -> mx.array:
        return self._forward(x, text, timestep, resume.resumed(self.module, block, output, text.tokens.shape[1]))

    def _forward(
        self,
        x: mx.array,
        text: Conditioning,
        timestep: mx.array,
        begun: AbstractContextManager[None] | None = None,
    ) -> mx.array:
        assert text.pooled is not None
        with modulated(self.module, text.pooled, timestep, len(x)) as key, begun or nullcontext():
            v: mx.array = self.module(x, text.tokens[:, :, None, :], key)
        return v

    def keeping(self, block: int, keep: Callable[[Any], None]) -> AbstractContextManager[None]:
        return resume.keeping(self.module, block, keep)

    def parts(self, text: Conditioning, timestep: mx.array, shape: tuple[int, ...]) -> list[Part]:
        return parts_of(self.module, text, timestep, shape)

    def layers(self) -> dict[str, nn.Module]:
        types = (nn.Linear, nn.QuantizedLinear, nn.Conv2d)
        found = {layer_name(path): child for path, child in self.module.named_modules() if isinstance(child, types)}
        return dict(sorted(found.items(), key=lambda item: network_order(item[0])))

    def path(self, name: str) -> str:
        return module_path(name)

    def blocks(self) -> list[str]:
        names = ("mm_block", "unified_block")
        return [f"{name}_{i}" for name, count in zip(names, self.depth, strict=True) for i in range(count)]

    def streams(self, block: str) -> tuple[str, ...]:
        return ("image", "text") if block.startswith("mm_block") else ()

    def block_of(self, name: str) -> int | None:
        head, _, _ = name.partition(".")
        stem, _, index = head.rpartition("_")
        if head == "final_layer":
            return sum(self.depth)
        first = {"mm_block": 0, "unified_block": self.depth[0]}.get(stem)
        return None if first is None else first + int(index)

    def shared_input(self, name: str) -> str:
        """q for k and v; the first adaLN for all, which read the same embedding of text and timestep."""
        if name.endswith(".adaln"):
            return "mm_block_0.image.adaln"
        if name.endswith((".k_proj", ".v_proj")):
            return name[: -len("k_proj")] + "q_proj"
        if name.startswith("unified_block") and name.endswith(".mlp.fc1"):
            parallel = self.module.config.parallel_mlp_for_unified_blocks
            return name.removesuffix("mlp.fc1") + "attn.q_proj" if parallel else name
        return name

    def kind(self, name: str) -> str:
        return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), "embedding")

    def tokens(self, latent_size: Sequence[int]) -> int:
        return int(latent_size[0] * latent_size[1] // self.module.config.patch_size**2)

    def text_widths(self) -> tuple[int, int]:
        config = self.module.config
        return int(config.token_level_text_embed_dim), int(config.pooled_text_embed_dim)

    def describe(self) -> dict[str, Any]:
        config = self.module.config
        values = {f.name: getattr(config, f.name) for f in fields(config)}
        return {
            "dtype": str(config.dtype).rpartition(".")[2],
            "pos_embed_type": config.pos_embed_type.name,
            "mmdit": {name: v for name, v in values.items() if not isinstance(v, mx.Dtype | Enum) and v is not None},
        }

    def sites(self) -> Iterator[Site]:
        """Yield adaLN's shift and scale for q, k, v, fc1 and the final layer, and v for o.

        v is linear in o's input as attention mixes tokens, not channels. fc2 has no site, as a GELU precedes it; nor
        has adaLN, after a SiLU; nor have the embedders, which nothing precedes.
        """
        layers = self.layers()
        for i, block in enumerate(self.module.multimodal_transformer_blocks):
            streams = (f"mm_block_{i}.image", f"mm_block_{i}.text")
            yield from _modulated(streams[0], block.image_transformer_block)
            yield from _modulated(streams[1], block.text_transformer_block)
            # Each stream attends to the values of both. The last text stream has no o_proj.
            readers = [f"{stream}.attn.o_proj" for stream in streams if f"{stream}.attn.o_proj" in layers]
            yield Site(tuple(readers), tuple(Producer(f"{stream}.attn.v_proj") for stream in streams))
        for i in range(self.depth[1]):
            name = f"unified_block_{i}"
            yield from _modulated(name, self.module.unified_transformer_blocks[i].transformer_block)
            yield Site((f"{name}.attn.o_proj",), (Producer(f"{name}.attn.v_proj"),))
        yield Site(("final_layer.linear",), _modulation("final_layer", 0, 2))


def _modulated(name: str, block: TransformerBlock) -> Iterator[Site]:
    """Yield the sites of a block's modulated stream; the chunks are those of ``TransformerBlock.pre_sdpa``."""
    attention = tuple(f"{name}.attn.{which}_proj" for which in "qkv")
    mlp = (f"{name}.mlp.fc1",)
    chunks = block.num_modulation_params
    yield Site(attention + mlp if block.parallel_mlp else attention, _modulation(name, 0, chunks))
    if not block.parallel_mlp and not block.skip_post_sdpa:
        yield Site(mlp, _modulation(name, 3, chunks))


def _modulation(name: str, first: int, chunks: int) -> tuple[Producer, Producer]:
    """adaLN's shift, chunk ``first``, and its scale, the next chunk, in x (1 + scale) + shift."""
    return Producer(f"{name}.adaln", first, chunks), Producer(f"{name}.adaln", first + 1, chunks, offset=1.0)
