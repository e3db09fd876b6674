"""mflux's text encoders, loaded at first use and freed by ``unload``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

from calib.models.architecture import Conditioning
from calib.models.mflux.precision import in_precision
from calib.models.model import weights

import mlx.core as mx
from mflux.models.common.tokenizer.tokenizer import LanguageTokenizer
from mlx import nn

#: Texts whose number of tokens is kept.
COUNTS_KEPT = 1 << 16
#: The name of rotary frequencies in mflux's encoders.
CONSTANT = "inv_freq"

#: A text, a model's tokenizers, its encoders -> tokens (tokens, width), and pooled (width,) where the family has it.
Encode: TypeAlias = Callable[..., mx.array | tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Encoder:
    """How a text encoder is made without weights.

    ``sizes``: what ``config.json`` calls its sizes: the names by which ``make`` takes those.
    """

    make: Callable[..., nn.Module]
    sizes: Mapping[str, str]


class TextEncoder:
    """Encodes a text as one row of conditioning.

    ``count(text)`` is the number of its tokens in the template, ``length`` the most that it may have; the first
    ``dropped``, which are the template's alone, do not count. Of several tokenizers it is the longest's that count.

    Args:
        tokenizers: mflux's of the model; texts are put into their template.
        skeletons: makes the encoders without weights; load: with.
        encode: mflux's.
        dtype: mflux's type for them.
        padded: whether mflux pads all texts to one length, which the transformer reads; else each keeps its own.
    """

    def __init__(
        self,
        tokenizers: Sequence[LanguageTokenizer],
        skeletons: Callable[[], Sequence[nn.Module]],
        load: Callable[[], Sequence[nn.Module]],
        encode: Encode,
        dtype: mx.Dtype,
        padded: bool = False,
        dropped: int = 0,
    ):
        self._tokenizers, self._load, self._encode, self._dtype = tokenizers, load, encode, dtype
        self._padded, self._dropped = padded, dropped
        self._encoders: Sequence[nn.Module] = ()
        self._longest = max(tokenizers, key=lambda own: own.max_length)
        self.length = int(self._longest.max_length) - dropped
        self.count = lru_cache(COUNTS_KEPT)(self._count)
        self.nbytes = sum(w.size for module in skeletons() for w in weights(module).values()) * dtype.size

    def __call__(self, text: str) -> Conditioning:
        self._encoders = self._encoders or self._load()
        with in_precision(self._dtype):
            # mflux has a space for an empty text, where it has one at all.
            found = self._encode(text or " ", *self._tokenizers, *self._encoders)
        tokens, pooled = (found[0], found[1][None]) if isinstance(found, tuple) else (found, None)
        return Conditioning(tokens[None], pooled, None if self._padded else (len(tokens),))

    def unload(self) -> None:
        """Free the encoders; the tokenizers stay loaded."""
        self._encoders = ()
        mx.clear_cache()

    def _count(self, text: str) -> int:
        """Number of tokens of ``text`` in its template, none cut off."""
        own, told = self._longest, text or " "
        if own.template:
            told = own.template.format(told)
        elif own.use_chat_template:
            given: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **own.chat_template_kwargs}
            told = own.tokenizer.apply_chat_template([{"role": "user", "content": told}], **given)
        found = own.tokenizer(told, add_special_tokens=own.add_special_tokens, verbose=False)["input_ids"]
        return len(found) - self._dropped


@contextmanager
def without_constants(module: nn.Module) -> Iterator[None]:
    """Take the rotary frequencies out of ``module`` in the context: MLX takes them for weights, files lack them."""
    own = [(child, child.pop(CONSTANT)) for child in module.modules() if CONSTANT in child]
    try:
        yield
    finally:
        for child, values in own:
            child[CONSTANT] = values
