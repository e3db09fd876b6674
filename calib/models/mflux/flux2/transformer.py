"""FLUX.2's transformer as mflux has it, as an :class:`~calib.models.architecture.Architecture`.

Blocks over text and picture side by side, then blocks over both in one array. All blocks of a kind share a modulation,
which is computed before them. Texts have one length, and all their tokens are attended to.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from calib.models.architecture import Conditioning, Part
from calib.models.mflux.parts import InParts, Names, times_of
from calib.models.mflux.precision import in_precision

import mlx.core as mx
from mflux.models.flux2.latent_creator.flux2_latent_creator import Flux2LatentCreator
from mflux.models.flux2.model.flux2_text_encoder.prompt_encoder import Flux2PromptEncoder
from mflux.models.flux2.model.flux2_transformer.transformer import Flux2Transformer

NAMES = Names(
    before={
        "x_embedder": "x_embedder",
        "context_embedder": "context_embedder",
        "t_embedder.0": "time_guidance_embed.linear_1",
        "t_embedder.2": "time_guidance_embed.linear_2",
        "modulation.image": "double_stream_modulation_img.linear",
        "modulation.text": "double_stream_modulation_txt.linear",
        "modulation.unified": "single_stream_modulation.linear",
    },
    blocks={
        "mm_block": (
            "transformer_blocks",
            {
                "image.attn.q_proj": "attn.to_q",
                "image.attn.k_proj": "attn.to_k",
                "image.attn.v_proj": "attn.to_v",
                "image.attn.o_proj": "attn.to_out",
                "image.mlp.fc1": "ff.linear_in",
                "image.mlp.fc2": "ff.linear_out",
                "text.attn.q_proj": "attn.add_q_proj",
                "text.attn.k_proj": "attn.add_k_proj",
                "text.attn.v_proj": "attn.add_v_proj",
                "text.attn.o_proj": "attn.to_add_out",
                "text.mlp.fc1": "ff_context.linear_in",
                "text.mlp.fc2": "ff_context.linear_out",
            },
        ),
        "unified_block": (
            "single_transformer_blocks",
            {"attn.qkv_mlp_proj": "attn.to_qkv_mlp_proj", "attn.o_mlp_proj": "attn.to_out"},
        ),
    },
    after={"final_layer.adaln": "norm_out.linear", "final_layer.linear": "proj_out"},
    kinds={
        "final_layer.adaln": "post-silu",
        "t_embedder.2": "post-silu",
        "modulation.image": "post-silu",
        "modulation.text": "post-silu",
        "modulation.unified": "post-silu",
        "q_proj": "modulated",
        "k_proj": "modulated",
        "v_proj": "modulated",
        "fc1": "modulated",
        "qkv_mlp_proj": "modulated",
        "final_layer.linear": "modulated",
        "o_proj": "post-attention",
        "fc2": "post-swiglu",
        "o_mlp_proj": "post-attention and post-swiglu",
    },
    streams={"mm_block": ("text", "image")},
)
#: Sets of shift, scale and gate that a modulation makes: for attention and MLP, or for both at once.
OF_TWO, OF_ONE = 2, 1


class Flux2Architecture(InParts):
    """mflux's ``Flux2Transformer``, ``module``; resumable and divisible.

    Args:
        about: the arguments that ``module`` was made with.
    """

    input_layer = "x_embedder"

    def __init__(self, module: Flux2Transformer, about: Mapping[str, Any]):
        super().__init__(module, NAMES)
        self._about = dict(about)
        self.width = int(module.inner_dim)
        self.heads = int(module.transformer_blocks[0].attn.heads)
        self._text_width = int(module.context_embedder.weight.shape[1])

    def parts(self, text: Conditioning, timestep: mx.array, shape: tuple[int, ...]) -> list[Part]:
        """Between parts pass both streams, the timestep's embedding, and the modulations that later blocks read.

        From the first unified block on the streams are one.
        """
        module, length, rows = self.module, text.tokens.shape[1], shape[0]
        places = _places(module, text.tokens, shape)

        def first(given: list[mx.array]) -> list[mx.array]:
            x = given[0]
            with in_precision(x.dtype):
                t = times_of(timestep, rows, x.dtype)
                # mflux takes numbers up to 1 for levels.
                t = t * mx.where(t <= 1.0, 1000.0, 1.0).astype(x.dtype)
                time = module.time_guidance_embed(t, None).astype(x.dtype)
                image, words = module.x_embedder(x.reshape(rows, -1, shape[-1])), module.context_embedder(text.tokens)
                made = (module.double_stream_modulation_img, module.double_stream_modulation_txt)
                more = [_joined(modulation(time)) for modulation in (*made, module.single_stream_modulation)]
            return [words, image, time, *more]

        def double(number: int) -> Part:
            def run(given: list[mx.array]) -> list[mx.array]:
                words, image, time, *more = given
                with in_precision(image.dtype):
                    words, image = module.transformer_blocks[number](
                        hidden_states=image,
                        encoder_hidden_states=words,
                        temb_mod_params_img=_sets(more[0], OF_TWO),
                        temb_mod_params_txt=_sets(more[1], OF_TWO),
                        image_rotary_emb=places,
                    )
                return [words, image, time, *more]

            return run

        def single(number: int) -> Part:
            def run(given: list[mx.array]) -> list[mx.array]:
                hidden, time, modulation = given if number else (mx.concatenate(given[:2], axis=1), given[2], given[-1])
                with in_precision(hidden.dtype):
                    hidden = module.single_transformer_blocks[number](
                        hidden_states=hidden,
                        temb_mod_params=_sets(modulation, OF_ONE)[0],
                        image_rotary_emb=places,
                    )
                return [hidden, time, modulation]

            return run

        def last(given: list[mx.array]) -> list[mx.array]:
            hidden, time, _ = given
            with in_precision(hidden.dtype):
                return [module.proj_out(module.norm_out(hidden[:, length:], time)).reshape(shape)]

        doubles, singles = self.depth
        return [first, *map(double, range(doubles)), *map(single, range(singles)), last]

    def shared_input(self, name: str) -> str:
        """q for k and v; the first modulation for all, which read a SiLU of the timestep's embedding."""
        if name.startswith("modulation.") or name == "final_layer.adaln":
            return "modulation.image"
        return re.sub(r"attn\.[kv]_proj$", "attn.q_proj", name)

    def tokens(self, latent_size: Sequence[int]) -> int:
        return latent_size[0] * latent_size[1]

    def text_widths(self) -> tuple[int, None]:
        return self._text_width, None

    def describe(self) -> dict[str, Any]:
        return {"flux2": self._about}


def _places(module: Flux2Transformer, tokens: mx.array, shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    """Cosines and sines of the rotary positions of the text's tokens, then the picture's, which all rows share."""
    _, height, width, _ = shape
    of_text = module.pos_embed(Flux2PromptEncoder.prepare_text_ids(tokens[:1])[0])
    of_image = module.pos_embed(Flux2LatentCreator.prepare_grid_ids(mx.zeros((1, 1, height, width)), t_coord=0)[0])
    cosines, sines = (mx.concatenate(list(both), axis=0) for both in zip(of_text, of_image, strict=True))
    return cosines, sines


def _joined(sets: Sequence[Sequence[mx.array]]) -> mx.array:
    """A modulation's sets of shift, scale and gate as one array; :func:`_sets` takes it apart."""
    return mx.concatenate([array for own in sets for array in own], axis=-1)


def _sets(modulation: mx.array, sets: int) -> list[tuple[mx.array, ...]]:
    arrays = mx.split(modulation, 3 * sets, axis=-1)
    return [tuple(arrays[3 * i : 3 * (i + 1)]) for i in range(sets)]
