"""Features of pictures and texts by CLIP, and what is said by the angles between them; features are kept by content."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from calib.base.device import device_kind
from calib.base.errors import CalibError
from calib.evaluation.features.clip import Clip
from calib.evaluation.features.clip_files import open_clip, prepared
from calib.evaluation.features.store import Pixels, Store, key_of
from calib.models.parallel import by_parts, shared_cores

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: Of how features are made; another one makes what is kept useless.
VERSION = 1


class ClipFeatures:
    """What a CLIP sees in pictures of eight bits, (height, width, 3) each, and reads in texts.

    Attributes:
        content: a hash of the CLIP's files, and the procedure's version.
    """

    def __init__(self, named: str, key: str, cache_dir: Path):
        self._files, self._cache_dir = open_clip(named, key), cache_dir

    @property
    def content(self) -> str:
        return f"{self._files.content}-{VERSION}"

    @cached_property
    def _store(self) -> Store:
        return Store(self._cache_dir / "features" / f"clip-{self.content}-{device_kind()}")

    @cached_property
    def _network(self) -> Clip:
        return self._files.load()

    def vectors(self, pictures: Sequence[Pixels]) -> NDArray[np.float32]:
        """Features of unit length, (pictures, features)."""
        keys = [key_of(picture) for picture in pictures]
        found = self._store.made(dict(zip(keys, pictures, strict=True)), self._length, self._of_pictures)
        return np.stack([found[key] for key in keys])

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Features of unit length, (texts, features)."""
        keys = [hashlib.sha256(f"text {text}".encode(errors="backslashreplace")).hexdigest() for text in texts]
        found = self._store.made(dict(zip(keys, texts, strict=True)), self._length, self._of_texts, "text")
        return np.stack([found[key] for key in keys])

    def scores(self, pictures: Sequence[Pixels], texts: Sequence[str]) -> NDArray[np.float64]:
        """CLIPScore of each picture with its text, 100 max(cos, 0): without the factor 2.5 of the paper."""
        return 100 * np.maximum(_cosines(self.vectors(pictures), self.texts(texts)), 0)

    def similarities(self, pairs: Sequence[tuple[Pixels, Pixels]]) -> NDArray[np.float64]:
        """The cosine of every pair's features, 1 where its pictures are equal."""
        return _cosines(*(self.vectors([pair[side] for pair in pairs]) for side in (0, 1)))

    def truncated(self, texts: Sequence[str]) -> int:
        """How many of ``texts`` are longer than what the CLIP reads."""
        return sum(len(row) > self.most_tokens for row in self._tokens(texts))

    @property
    def most_tokens(self) -> int:
        """The number of tokens that it reads, begin and end included."""
        return self._files.sizes.places

    @property
    def _length(self) -> int:
        return self._files.sizes.features

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, of any number."""
        encodable = [text.encode(errors="backslashreplace").decode() for text in texts]
        found: list[list[int]] = self._files.tokenizer(encodable, verbose=False)["input_ids"]
        return found

    def _of_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        end, most = self._files.tokenizer.eos_token_id, self.most_tokens
        rows = [[*row[: most - 1], end] for row in self._tokens(texts)]
        ends = np.array([row.index(end) for row in rows], np.int32)
        tokens = np.full((len(rows), 1 + int(ends.max())), end, np.int32)
        for number, (row, last) in enumerate(zip(rows, ends, strict=True)):
            tokens[number, :last] = row[:last]
        with shared_cores(len(rows)):
            network = self._network
            return self._finite(by_parts(len(rows), lambda p: network.texts(mx.array(tokens[p]), mx.array(ends[p]))))

    def _of_pictures(self, pictures: Sequence[Pixels]) -> NDArray[np.float32]:
        x = np.stack([prepared(self._files.processor, picture) for picture in pictures])
        with shared_cores(len(x)):
            network = self._network
            return self._finite(by_parts(len(x), lambda part: network.pictures(mx.array(x[part]))))

    def _finite(self, features: mx.array) -> NDArray[np.float32]:
        found = np.array(features)
        if not np.isfinite(found).all():
            raise CalibError(f"{self._files.folder}: its features are not finite; copy the CLIP's files again")
        return found


def _cosines(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosines of rows, in float64; exactly 1 where they are equal."""
    a, b = x.astype(np.float64), y.astype(np.float64)
    found: NDArray[np.float64] = np.sum(a * b, axis=1) / np.sqrt(np.sum(a * a, axis=1) * np.sum(b * b, axis=1))
    return np.clip(found, -1, 1)
