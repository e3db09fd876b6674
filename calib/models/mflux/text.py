"""mflux's text encoders, loaded at first use and freed by ``unload``; each text keeps its own number of tokens."""

from collections.abc import Callable
from functools import lru_cache

from calib.models.architecture import Conditioning
from calib.models.mflux.precision import in_precision
from calib.models.model import weights

import mlx.core as mx
from mflux.models.common.tokenizer.tokenizer import LanguageTokenizer
from mlx import nn

#: Texts whose number of tokens is kept.
COUNTS_KEPT = 1 << 16


class TextEncoder:
    """Encodes a text as one row of conditioning.

    ``count(text)`` is the number of its tokens in the chat template.

    Args:
        tokenizer: mflux's of the model; texts are put into its chat template.
        skeleton: makes the encoder without weights; load: with.
        encode: mflux's: (text, tokenizer, encoder) -> (tokens, width).
    """

    def __init__(
        self,
        tokenizer: LanguageTokenizer,
        skeleton: Callable[[], nn.Module],
        load: Callable[[], nn.Module],
        encode: Callable[[str, LanguageTokenizer, nn.Module], mx.array],
        dtype: mx.Dtype,
    ):
        self._tokenizer, self._load, self._encode, self._dtype = tokenizer, load, encode, dtype
        self._encoder: nn.Module | None = None
        self.length = int(tokenizer.max_length)
        self.count = lru_cache(COUNTS_KEPT)(self._count)
        self.nbytes = sum(weight.size for weight in weights(skeleton()).values()) * dtype.size

    def __call__(self, text: str) -> Conditioning:
        if self._encoder is None:
            self._encoder = self._load()
        with in_precision(self._dtype):
            # mflux has a space for an empty text, where it has one at all.
            tokens = self._encode(text or " ", self._tokenizer, self._encoder)
        return Conditioning(tokens[None], lengths=(len(tokens),))

    def unload(self) -> None:
        """Free the encoder; the tokenizer stays loaded."""
        self._encoder = None
        mx.clear_cache()

    def _count(self, text: str) -> int:
        """Number of tokens of ``text`` in its template, none cut off."""
        own = self._tokenizer
        told = own.tokenizer.apply_chat_template(
            [{"role": "user", "content": text or " "}],
            tokenize=False,
            add_generation_prompt=True,
            **own.chat_template_kwargs,
        )
        return len(own.tokenizer(told, add_special_tokens=own.add_special_tokens, verbose=False)["input_ids"])
