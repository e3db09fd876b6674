"""Token ids of prompts: CLIP's tokenizer defined for every text, and truncation without DiffusionKit's warnings."""

import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)

from diffusionkit.mlx.tokenizer import Tokenizer


def fit(tokens: Sequence[int], length: int, pad: int) -> list[int]:
    """Pad ``tokens`` with ``pad`` to ``length`` ids, or truncate them before the last id, the end token."""
    if len(tokens) > length:
        return [*tokens[: length - 1], tokens[-1]]
    return [*tokens, *[pad] * (length - len(tokens))]


def _byte_letters() -> list[str]:
    """The letter for each byte in CLIP's vocabulary: the byte itself where printable, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


BYTE_LETTERS = _byte_letters()


class ClipTokenizer(Tokenizer):  # type: ignore[misc]  # DiffusionKit has no types
    """DiffusionKit's CLIP tokenizer over the letters of UTF-8 bytes, as in OpenAI's, so that it accepts every text.

    DiffusionKit looks characters up directly, which raises KeyError for 日 and gives é the token of another character.
    ASCII text gets the same ids. Nothing is truncated; :func:`fit` does that.
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer.bpe_ranks, tokenizer.vocab, tokenizer.pad_with_eos)
        self.max_length = sys.maxsize

    def bpe(self, text: str) -> Any:
        return super().bpe("".join(BYTE_LETTERS[byte] for byte in text.encode("utf-8", "replace")))

    def tokenize(self, text: str, prepend_bos: bool = True, append_eos: bool = True) -> Any:
        return super().tokenize(unicodedata.normalize("NFC", text), prepend_bos, append_eos)
