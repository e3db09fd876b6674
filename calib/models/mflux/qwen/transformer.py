"""Qwen-Image's transformer as mflux has it, as an :class:`~calib.models.architecture.Architecture`.

Blocks over text and picture side by side, each with a modulation of its own. Texts keep their own number of tokens: in
a batch with a longer one a row repeats its last, to which nothing attends, so that nothing that a row gives depends on
the others.

mflux draws noise in float32 whatever the type of the weights, so that all activations are of that type.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from calib.models.architecture import Conditioning, Part
from calib.models.mflux.parts import InParts, Names, by_row, repeated, times_of
from calib.models.mflux.precision import in_precision

import mlx.core as mx
import numpy as np
from mflux.models.qwen.model.qwen_transformer.qwen_attention import QwenAttention
from mflux.models.qwen.model.qwen_transformer.qwen_transformer import QwenTransformer

#: Layers of a block in the order in which they run.
WITHIN_BLOCK = {
    "image.adaln": "img_mod_linear",
    "text.adaln": "txt_mod_linear",
    "image.attn.q_proj": "attn.to_q",
    "image.attn.k_proj": "attn.to_k",
    "image.attn.v_proj": "attn.to_v",
    "text.attn.q_proj": "attn.add_q_proj",
    "text.attn.k_proj": "attn.add_k_proj",
    "text.attn.v_proj": "attn.add_v_proj",
    "image.attn.o_proj": "attn.attn_to_out.0",
    "text.attn.o_proj": "attn.to_add_out",
    "image.mlp.fc1": "img_ff.mlp_in",
    "image.mlp.fc2": "img_ff.mlp_out",
    "text.mlp.fc1": "txt_ff.mlp_in",
    "text.mlp.fc2": "txt_ff.mlp_out",
}
NAMES = Names(
    before={
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "t_embedder.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.2": "time_text_embed.timestep_embedder.linear_2",
    },
    blocks={"mm_block": ("transformer_blocks", WITHIN_BLOCK)},
    after={"final_layer.adaln": "norm_out.linear", "final_layer.linear": "proj_out"},
    kinds={
        "adaln": "post-silu",
        "t_embedder.2": "post-silu",
        "q_proj": "modulated",
        "k_proj": "modulated",
        "v_proj": "modulated",
        "fc1": "modulated",
        "final_layer.linear": "modulated",
        "o_proj": "post-attention",
        "fc2": "post-gelu",
    },
    streams={"mm_block": ("text", "image")},
)


def _as_given(convert: Any) -> Any:
    """mflux's ``convert`` of a mask, which waits for the device to read it; one of four axes is taken as it is."""

    def converted(mask: mx.array | None, joint_seq_len: int, txt_seq_len: int) -> mx.array | None:
        found: mx.array | None = mask
        if mask is not None and mask.ndim != 4:
            found = convert(mask, joint_seq_len, txt_seq_len)
        return found

    return converted


QwenAttention._apply_rope_qwen = staticmethod(by_row(QwenAttention._apply_rope_qwen, axes=2))
QwenAttention._convert_mask_for_qwen = staticmethod(_as_given(QwenAttention._convert_mask_for_qwen))


class QwenArchitecture(InParts):
    """mflux's ``QwenTransformer``, ``module``; resumable and divisible.

    Args:
        about: the arguments that ``module`` was made with.
    """

    input_layer = "x_embedder"

    def __init__(self, module: QwenTransformer, about: Mapping[str, Any]):
        super().__init__(module, NAMES)
        self._about = dict(about)
        self.width = int(module.inner_dim)
        self.heads = int(module.transformer_blocks[0].attn.num_heads)
        self._text_width = int(module.txt_in.weight.shape[1])

    def parts(self, text: Conditioning, timestep: mx.array, shape: tuple[int, ...]) -> list[Part]:
        """Between parts pass both streams and the timestep's embedding."""
        module, rows, longest = self.module, shape[0], text.tokens.shape[1]
        lengths = text.lengths or (longest,) * rows
        tables, mask = _tables(module, shape, lengths, longest), _mask(shape, lengths, longest)

        def first(given: list[mx.array]) -> list[mx.array]:
            image = module.img_in(given[0].reshape(rows, -1, shape[-1]))
            # mflux rounds the text, and its norm, to 16 bits whatever the type of the weights.
            words = text.tokens.astype(mx.bfloat16)
            if mask is not None:
                words = mx.take_along_axis(words, mx.array(repeated(lengths, longest))[..., None], axis=1)
            time = module.time_text_embed(times_of(timestep, rows, image.dtype), image)
            normed = module.txt_norm(words).astype(module.txt_norm.weight.dtype)
            return [module.txt_in(normed), image, time]

        def block(number: int) -> Part:
            def run(given: list[mx.array]) -> list[mx.array]:
                words, image, time = given
                words, image = module.transformer_blocks[number](
                    hidden_states=image,
                    encoder_hidden_states=words,
                    encoder_hidden_states_mask=mask,
                    text_embeddings=time,
                    image_rotary_emb=tables,
                )
                return [words, image, time]

            return run

        def last(given: list[mx.array]) -> list[mx.array]:
            _, image, time = given
            with in_precision(module.txt_norm.weight.dtype):  # which stays where layers are quantized
                return [module.proj_out(module.norm_out(image, time)).reshape(shape)]

        return [first, *map(block, range(self.depth[0])), last]

    def shared_input(self, name: str) -> str:
        """q for k and v; the first adaLN for all but the last, whose input mflux rounds."""
        if name.endswith(".adaln") and name not in NAMES.after:
            return "mm_block_0.image.adaln"
        return re.sub(r"attn\.[kv]_proj$", "attn.q_proj", name)

    def tokens(self, latent_size: Sequence[int]) -> int:
        return latent_size[0] * latent_size[1]

    def text_widths(self) -> tuple[int, None]:
        return self._text_width, None

    def describe(self) -> dict[str, Any]:
        return {"qwen_image": self._about}


def _tables(
    module: QwenTransformer, shape: tuple[int, ...], lengths: Sequence[int], longest: int
) -> tuple[tuple[mx.array, mx.array], tuple[mx.array, mx.array]]:
    """Cosines and sines of the rotary positions of the picture's tokens, and of the text's, which may differ by row."""
    of_image, of_text = module.pos_embed((1, *shape[1:3]), [longest])
    if set(lengths) != {longest}:
        places = mx.array(repeated(lengths, longest))
        of_text = tuple(table[places] for table in of_text)
    return of_image, of_text


def _mask(shape: tuple[int, ...], lengths: Sequence[int], longest: int) -> mx.array | None:
    """Which of the text's and the picture's tokens may be attended to, (rows, 1, 1, tokens); None where that is all."""
    if set(lengths) == {longest}:
        return None
    own = np.arange(longest + shape[1] * shape[2])
    return mx.array((own < np.array(lengths)[:, None]) | (own >= longest))[:, None, None]
