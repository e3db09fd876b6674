"""How a model encodes prompts: each once, by itself, and where memory is short in advance."""

from collections.abc import Callable, Iterator, Sequence

from calib.models.architecture import Conditioning

import mlx.core as mx

#: Prompts encoded in advance where the text encoders do not fit beside the transformer: about 300 MB with SD3 and T5.
ENCODE_AHEAD = 64
#: Prompts whose conditioning is cached, including the empty prompt.
ROWS_KEPT = 64


class Encoding:
    """The part of a :class:`~calib.models.model.DiffusionModel` that encodes prompts; it describes the attributes."""

    encode_text: Callable[[str], Conditioning]
    unload_text: Callable[[], None]
    token_count: Callable[[str], int]
    max_prompt_tokens: int
    dtype: mx.Dtype
    _rows: dict[str, Conditioning]
    #: Number of rows that are kept at most.
    _kept = ROWS_KEPT

    def encode(self, prompts: Sequence[str], cfg_weight: float) -> Conditioning:
        """Conditioning of a batch: all conditional rows, then with guidance as many unconditional rows.

        Each prompt is encoded by itself, so that its conditioning does not depend on the batch, and is cached.
        """
        rows = {prompt: self._row(prompt) for prompt in dict.fromkeys(prompts)}
        parts = [rows[prompt] for prompt in prompts]
        if cfg_weight > 0:
            parts += [self._row("")] * len(prompts)
        return Conditioning.batch(parts)

    def encode_batches(
        self,
        batches: Sequence[Sequence[str]],
        cfg_weight: float,
        keep_text: bool,
        beside: Sequence[Sequence[str]] | None = None,
    ) -> Iterator[Conditioning]:
        """Yield the conditioning of each batch, as :meth:`encode` returns it.

        Unless ``keep_text``, batches are encoded in advance and the text encoders unloaded before the first is yielded.

        Args:
            beside: for each batch, texts that it has room for, too, where texts differ in length: matrix products of
                another shape differ in the last bits.
        """
        ahead = 1 if keep_text or not batches else max(1, ENCODE_AHEAD // len(batches[0]))
        for first in range(0, len(batches), ahead):
            chosen = range(first, min(first + ahead, len(batches)))
            texts = [self._with_room(self.encode(batches[i], cfg_weight), beside[i] if beside else ()) for i in chosen]
            if not keep_text:
                self.unload_text()
            yield from texts

    def hold(self, prompts: Sequence[str]) -> None:
        """Encode all of ``prompts`` and the empty one, keep them, and unload the text encoders."""
        self._kept = max(ROWS_KEPT, len(set(prompts)) + 1)
        for prompt in dict.fromkeys((*prompts, "")):
            self._row(prompt)
        self.unload_text()

    def _with_room(self, text: Conditioning, beside: Sequence[str]) -> Conditioning:
        if not beside or text.lengths is None:
            return text
        return text.padded(min(max(map(self.token_count, beside)), self.max_prompt_tokens))

    def _row(self, prompt: str) -> Conditioning:
        """Conditioning of one prompt, one row in the transformer's type, evaluated."""
        if prompt in self._rows:
            self._rows[prompt] = row = self._rows.pop(prompt)
            return row
        row = self.encode_text(prompt).astype(self.dtype)
        mx.eval(row.arrays())
        self._rows[prompt] = row
        if len(self._rows) > self._kept:
            del self._rows[next(iter(self._rows))]
        return row
