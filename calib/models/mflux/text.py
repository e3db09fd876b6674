"""mflux's text encoders, loaded at first use and freed by ``unload``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

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


class TextEncoder:
    """Encodes a text as one row of conditioning.

    ``count(text)`` is the number of its tokens in the template, ``length`` the most that it may have; the first
    ``dropped``, which are the template's alone, do not count.

    Args:
        tokenizer: mflux's of the model; texts are put into its template.
        skeleton: makes the encoder without weights; load: with.
        encode: mflux's: (text, tokenizer, encoder) -> (tokens, width).
        dtype: mflux's type for it.
        padded: whether mflux pads all texts to one length, which the transformer reads; else each keeps its own.
    """

    def __init__(
        self,
        tokenizer: LanguageTokenizer,
        skeleton: Callable[[], nn.Module],
        load: Callable[[], nn.Module],
        encode: Callable[[str, LanguageTokenizer, nn.Module], mx.array],
        dtype: mx.Dtype,
        padded: bool = False,
        dropped: int = 0,
    ):
        self._tokenizer, self._load, self._encode, self._dtype = tokenizer, load, encode, dtype
        self._padded, self._dropped = padded, dropped
        self._encoder: nn.Module | None = None
        self.length = int(tokenizer.max_length) - dropped
        self.count = lru_cache(COUNTS_KEPT)(self._count)
        self.nbytes = sum(weight.size for weight in weights(skeleton()).values()) * dtype.size

    def __call__(self, text: str) -> Conditioning:
        if self._encoder is None:
            self._encoder = self._load()
        with in_precision(self._dtype):
            # mflux has a space for an empty text, where it has one at all.
            tokens = self._encode(text or " ", self._tokenizer, self._encoder)
        return Conditioning(tokens[None], lengths=None if self._padded else (len(tokens),))

    def unload(self) -> None:
        """Free the encoder; the tokenizer stays loaded."""
        self._encoder = None
        mx.clear_cache()

    def _count(self, text: str) -> int:
        """Number of tokens of ``text`` in its template, none cut off."""
        own, text = self._tokenizer, text or " "
        if own.template:
            told = own.template.format(text)
        else:
            messages = [{"role": "user", "content": text}]
            given = {"tokenize": False, "add_generation_prompt": True, **own.chat_template_kwargs}
            told = own.tokenizer.apply_chat_template(messages, **given)
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
