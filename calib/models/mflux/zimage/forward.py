"""The forward pass of mflux's Z-Image transformer, in parts and for a batch.

mflux pads a picture's tokens and a text's to multiples of 32, with a learned token each that takes part in attention.
Texts of one padded length need no more than that. Where they differ in it, all are as long as the longest: what a row
has too much repeats its last token, and no token attends to it. So nothing that a row gives depends on the others, and
taps see no number that mflux would not compute, some more than once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from calib.models.architecture import Conditioning, Part
from calib.models.mflux.parts import by_row, repeated, times_of
from calib.models.mflux.precision import in_precision

import mlx.core as mx
import numpy as np
from mflux.models.z_image.model.z_image_transformer.attention import ZImageAttention
from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer

#: Tokens are padded to multiples of this.
MULTIPLE = 32
#: The patches of the embedder and the final layer that mflux uses: 2 by 2 places of one frame.
KEY = "2-1"


def padded(tokens: int) -> int:
    """The number of tokens after padding."""
    return tokens + -tokens % MULTIPLE


ZImageAttention.apply_rotary_emb = staticmethod(by_row(ZImageAttention.apply_rotary_emb, axes=3))


@dataclass(frozen=True)
class _Places:
    """Positions and masks of a batch's tokens.

    Attributes:
        picture, text: tables of rotary positions, (tokens, …), or (rows, tokens, …) where texts differ in length.
        mask: which of a text's tokens may be attended to, (rows, tokens); None where that is all.
    """

    picture: mx.array
    text: mx.array
    mask: mx.array | None

    @property
    def both(self) -> mx.array:
        return mx.concatenate([self.picture, self.text], axis=-3)

    def mask_of_both(self) -> mx.array | None:
        """Which of the picture's and the text's tokens may be attended to."""
        if self.mask is None:
            return None
        all_of_picture = mx.ones((len(self.mask), self.picture.shape[-3]), dtype=mx.bool_)
        return mx.concatenate([all_of_picture, self.mask], axis=1)

    @classmethod
    def of(cls, module: ZImageTransformer, patches: tuple[int, int], lengths: Sequence[int], longest: int) -> "_Places":
        """Of texts of these padded ``lengths``, in a batch of the ``longest``."""
        tables = {length: _tables(module, patches, length, longest) for length in set(lengths)}
        if list(tables) == [longest]:
            return cls(*tables[longest], None)
        picture, text = (mx.stack([tables[length][part] for length in lengths]) for part in (0, 1))
        return cls(picture, text, mx.array(np.arange(longest) < np.array(lengths)[:, None]))


def _tables(
    module: ZImageTransformer, patches: tuple[int, int], length: int, longest: int
) -> tuple[mx.array, mx.array]:
    """Tables of the positions of a picture and of a text: first come the text's tokens in turn, then the picture's.

    The picture's padding is at the origin, whatever the text.
    """
    height, width = patches
    picture = np.zeros((padded(height * width), 3), np.int32)
    grid = np.stack(np.meshgrid([length + 1], np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    picture[: height * width] = grid.reshape(-1, 3)
    text = np.zeros((longest, 3), np.int32)
    text[:, 0] = 1 + np.minimum(np.arange(longest), length - 1)
    return module.rope_embedder(mx.array(picture)), module.rope_embedder(mx.array(text))


def parts_of(module: ZImageTransformer, text: Conditioning, timestep: mx.array, shape: tuple[int, ...]) -> list[Part]:
    """The forward pass for x of ``shape`` in parts; see :class:`calib.models.architecture.Divisible`.

    From part to part pass the picture's tokens, the text's and the timestep's embedding; from the first unified block
    on both in one array, and the embedding.
    """
    rows, height, width, channels = shape
    size = module.patch_size
    patches = (height // size, width // size)
    real, longest = patches[0] * patches[1], padded(text.tokens.shape[1])
    lengths = text.lengths or (text.tokens.shape[1],) * rows
    places = _Places.of(module, patches, [padded(length) for length in lengths], longest)
    own, mask = (places.text, places.mask), places.mask_of_both()

    def first(given: list[mx.array]) -> list[mx.array]:
        x = given[0]
        with in_precision(x.dtype):
            t = times_of(timestep, rows, mx.float32)
            embedded = module.stream_t_emb(module.t_embedder(t * module.t_scale), module.float32)
        tokens = x.reshape(rows, patches[0], size, patches[1], size, channels).transpose(0, 1, 3, 2, 4, 5)
        picture = module.all_x_embedder[KEY](tokens.reshape(rows, real, -1))
        more = mx.broadcast_to(module.x_pad_token.astype(picture.dtype), (rows, padded(real) - real, picture.shape[-1]))
        return [mx.concatenate([picture, more], axis=1), _embedded(module, text.tokens, lengths, longest), embedded]

    def noise_refiner(number: int) -> Part:
        def run(given: list[mx.array]) -> list[mx.array]:
            picture, words, t = given
            block = module.noise_refiner[number]
            return [block(x=picture, attn_mask=None, freqs_cis=places.picture, t_emb=t), words, t]

        return run

    def context_refiner(number: int) -> Part:
        def run(given: list[mx.array]) -> list[mx.array]:
            picture, words, t = given
            block = module.context_refiner[number]
            return [picture, block(x=words, attn_mask=own[1], freqs_cis=own[0]), t]

        return run

    def unified(number: int) -> Part:
        def run(given: list[mx.array]) -> list[mx.array]:
            *streams, t = given
            hidden = mx.concatenate(streams, axis=1) if len(streams) > 1 else streams[0]
            return [module.layers[number](x=hidden, attn_mask=mask, freqs_cis=places.both, t_emb=t), t]

        return run

    def last(given: list[mx.array]) -> list[mx.array]:
        hidden, t = given[0], given[-1]
        v = module.all_final_layer[KEY](hidden[:, :real], t).reshape(rows, *patches, size, size, channels)
        return [-v.transpose(0, 1, 3, 2, 4, 5).reshape(shape)]

    kinds = ((noise_refiner, "noise_refiner"), (context_refiner, "context_refiner"), (unified, "layers"))
    return [first, *(make(i) for make, place in kinds for i in range(len(getattr(module, place)))), last]


def _embedded(module: ZImageTransformer, tokens: mx.array, lengths: Sequence[int], longest: int) -> mx.array:
    """The text's tokens (rows, longest, width): its own, then padding, then the last of these again."""
    norm, linear = module.cap_embedder
    places = np.arange(longest)
    words = linear(norm(mx.take_along_axis(tokens, mx.array(repeated(lengths, longest))[..., None], axis=1)))
    padding = mx.array(places >= np.array(lengths)[:, None])
    words = mx.where(padding[..., None], module.cap_pad_token.astype(words.dtype), words)
    again = repeated([padded(length) for length in lengths], longest)
    if (again == places).all():
        return words
    return mx.take_along_axis(words, mx.array(again)[..., None], axis=1)
