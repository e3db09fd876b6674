"""FLUX.1's transformer as mflux has it, as an :class:`~calib.models.architecture.Architecture`.

Blocks over text and picture side by side, then blocks over both in one array, each with a modulation of its own. Texts
have one length, and all their tokens are attended to.

mflux draws noise in float32 whatever the type of the weights, so that activations are of that type, but for the
embedding of timestep, guidance and pooled text and the modulations, which have the weights'.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from calib.models.architecture import Conditioning, Part
from calib.models.mflux.parts import InParts, Names, times_of
from calib.models.mflux.precision import in_precision

import mlx.core as mx
from mflux.models.flux.model.flux_transformer.common.attention_utils import AttentionUtils
from mflux.models.flux.model.flux_transformer.transformer import Transformer

NAMES = Names(
    before={
        "x_embedder": "x_embedder",
        "context_embedder": "context_embedder",
        "t_embedder.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.2": "time_text_embed.timestep_embedder.linear_2",
        "guidance_in.0": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.2": "time_text_embed.guidance_embedder.linear_2",
        "y_embedder.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.2": "time_text_embed.text_embedder.linear_2",
    },
    blocks={
        "mm_block": (
            "transformer_blocks",
            {
                "image.adaln": "norm1.linear",
                "text.adaln": "norm1_context.linear",
                "image.attn.q_proj": "attn.to_q",
                "image.attn.k_proj": "attn.to_k",
                "image.attn.v_proj": "attn.to_v",
                "text.attn.q_proj": "attn.add_q_proj",
                "text.attn.k_proj": "attn.add_k_proj",
                "text.attn.v_proj": "attn.add_v_proj",
                "image.attn.o_proj": "attn.to_out.0",
                "text.attn.o_proj": "attn.to_add_out",
                "image.mlp.fc1": "ff.linear1",
                "image.mlp.fc2": "ff.linear2",
                "text.mlp.fc1": "ff_context.linear1",
                "text.mlp.fc2": "ff_context.linear2",
            },
        ),
        "unified_block": (
            "single_transformer_blocks",
            {
                "adaln": "norm.linear",
                "attn.q_proj": "attn.to_q",
                "attn.k_proj": "attn.to_k",
                "attn.v_proj": "attn.to_v",
                "mlp.fc1": "proj_mlp",
                "attn.o_mlp_proj": "proj_out",
            },
        ),
    },
    after={"final_layer.adaln": "norm_out.linear", "final_layer.linear": "proj_out"},
    kinds={
        "adaln": "post-silu",
        "embedder.2": "post-silu",
        "guidance_in.2": "post-silu",
        "q_proj": "modulated",
        "k_proj": "modulated",
        "v_proj": "modulated",
        "fc1": "modulated",
        "final_layer.linear": "modulated",
        "o_proj": "post-attention",
        "fc2": "post-gelu",
        "o_mlp_proj": "post-attention and post-gelu",
    },
    streams={"mm_block": ("text", "image")},
)


def _of_rows(compute: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """mflux's attention ``compute`` of as many rows as there are, not of the one that FLUX.1's layers tell it of."""

    def computed(
        query: mx.array, key: mx.array, value: mx.array, batch_size: int, *more: Any, **named: Any
    ) -> mx.array:
        return compute(query, key, value, len(query), *more, **named)

    return computed


AttentionUtils.compute_attention = staticmethod(_of_rows(AttentionUtils.compute_attention))


class Flux1Architecture(InParts):
    """mflux's FLUX.1 ``Transformer``, ``module``; resumable and divisible.

    Args:
        key: under which it describes itself.
        about: the sizes that ``module`` was made with.
        guidance: 1000 times that of a model that takes it as an input.
    """

    input_layer = "x_embedder"

    def __init__(self, module: Transformer, key: str, about: Mapping[str, Any], guidance: float):
        super().__init__(module, NAMES)
        self._key, self._about, self._guidance = key, dict(about), guidance
        self.heads = int(module.transformer_blocks[0].attn.num_heads)
        self.width = int(module.x_embedder.weight.shape[0])
        read = (module.context_embedder, module.time_text_embed.text_embedder.linear_1)
        self._text_width, self._pooled_width = (int(layer.weight.shape[1]) for layer in read)

    def parts(self, text: Conditioning, timestep: mx.array, shape: tuple[int, ...]) -> list[Part]:
        """Between parts pass both streams and the embedding; from the first unified block on the streams are one."""
        module, length, rows = self.module, text.tokens.shape[1], shape[0]
        places = _places(module, length, shape)
        # It stays where layers are quantized.
        precision = module.transformer_blocks[0].attn.norm_q.weight.dtype
        assert text.pooled is not None
        pooled = text.pooled.astype(precision)

        def first(given: list[mx.array]) -> list[mx.array]:
            image = module.x_embedder(given[0].reshape(rows, -1, shape[-1]))
            words = module.context_embedder(text.tokens)
            times, guidance = times_of(timestep, rows, mx.float32), mx.full((rows,), self._guidance)
            with in_precision(precision):
                embedded = module.time_text_embed(times, pooled, guidance)
            return [words, image, embedded]

        def double(number: int) -> Part:
            def run(given: list[mx.array]) -> list[mx.array]:
                words, image, embedded = given
                words, image = module.transformer_blocks[number](
                    hidden_states=image,
                    encoder_hidden_states=words,
                    text_embeddings=embedded,
                    rotary_embeddings=places,
                )
                return [words, image, embedded]

            return run

        def single(number: int) -> Part:
            def run(given: list[mx.array]) -> list[mx.array]:
                *streams, embedded = given
                hidden = mx.concatenate(streams, axis=1) if len(streams) > 1 else streams[0]
                hidden = module.single_transformer_blocks[number](
                    hidden_states=hidden, text_embeddings=embedded, rotary_embeddings=places
                )
                return [hidden, embedded]

            return run

        def last(given: list[mx.array]) -> list[mx.array]:
            hidden, embedded = given
            with in_precision(precision):
                return [module.proj_out(module.norm_out(hidden[:, length:], embedded)).reshape(shape)]

        doubles, singles = self.depth
        return [first, *map(double, range(doubles)), *map(single, range(singles)), last]

    def shared_input(self, name: str) -> str:
        """q for k and v, and in unified blocks for the MLP, too; the first adaLN for all."""
        if name.endswith(".adaln"):
            return "mm_block_0.image.adaln"
        name = re.sub(r"^(unified_block_\d+)\.mlp\.fc1$", r"\1.attn.q_proj", name)
        return re.sub(r"attn\.[kv]_proj$", "attn.q_proj", name)

    def tokens(self, latent_size: Sequence[int]) -> int:
        return latent_size[0] * latent_size[1]

    def text_widths(self) -> tuple[int, int]:
        return self._text_width, self._pooled_width

    def describe(self) -> dict[str, Any]:
        return {self._key: self._about}


def _places(module: Transformer, length: int, shape: tuple[int, ...]) -> mx.array:
    """Tables of the rotary positions of the text's tokens, then the picture's, which all rows share."""
    _, height, width, _ = shape
    of_image = Transformer._prepare_latent_image_ids(16 * height, 16 * width)
    tables: mx.array = module.pos_embed(mx.concatenate([Transformer._prepare_text_ids(length), of_image], axis=1))
    return tables
