"""Token ids of prompts: CLIP's tokenizer for every text, and cutting without DiffusionKit's warnings."""

import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)

from diffusionkit.mlx.tokenizer import Tokenizer


def fit(tokens: Sequence[int], length: int, pad: int) -> list[int]:
    """``tokens`` as ``length`` ids: the shorter padded with ``pad``, the longer cut before the last (the end token)."""
    if len(tokens) > length:
        return [*tokens[: length - 1], tokens[-1]]
    return [*tokens, *[pad] * (length - len(tokens))]


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in CLIP's vocabulary: itself where printable, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


BYTE_LETTERS = _byte_letters()


class ClipTokenizer(Tokenizer):  # type: ignore[misc]  # DiffusionKit has no types
    """DiffusionKit's CLIP tokenizer, made total as OpenAI's is: a word is spelt in the letters of its UTF-8 bytes.

    DiffusionKit looks characters up as they are: a KeyError for 日, and for é the token of another character. ASCII
    gives the same ids. Nothing is cut: :func:`fit` does that.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer.bpe_ranks, tokenizer.vocab, tokenizer.pad_with_eos)
        self.max_length = sys.maxsize

    def bpe(self, text: str) -> Any:
        return super().bpe("".join(BYTE_LETTERS[byte] for byte in text.encode("utf-8", "replace")))

    def tokenize(self, text: str, prepend_bos: bool = True, append_eos: bool = True) -> Any:
        return super().tokenize(unicodedata.normalize("NFC", text), prepend_bos, append_eos)
