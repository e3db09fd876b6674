"""Draw the same images with a changed model and compare pictures, and compare outputs on the same states by step.

The reference is a dataset drawn at full precision, with its prompts, seeds, noise, final latents and states.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from calib.activations.batches import Batch, LazyBatch, StoredStates, output_of
from calib.activations.states import image_hashes, read_states
from calib.activations.taps import TapPoint, tapped
from calib.base.progress import Progress
from calib.dataset.generate import trajectory_from
from calib.dataset.manifest import Manifest
from calib.evaluation.measures import NONE, Chosen
from calib.evaluation.metrics import Fidelity, psnr, relative_error, ssim
from calib.models.memory import plan_memory
from calib.models.model import DiffusionModel
from calib.models.parallel import shared_cores

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: What is always measured of pairs of pictures.
ALWAYS = {"psnr": psnr, "ssim": ssim}
#: Images of which pictures and outputs are kept, and whose outputs are compared at once.
KEPT = 64
#: Returns a context in which the model is changed.
Change: TypeAlias = Callable[[], AbstractContextManager[None]]
Picture: TypeAlias = NDArray[np.float32]
#: (images, height, width, 3).
Pictures: TypeAlias = NDArray[np.float32]
#: Is given pictures at full precision and those of a changed model.
See: TypeAlias = Callable[[Pictures, Pictures], None]


def unseen(exact: Pictures, drawn: Pictures) -> None:
    """Look at no picture."""


@dataclass(frozen=True)
class Reference:
    """All images of a dataset drawn by the full-precision model; outputs are compared at ``steps``."""

    data_dir: Path
    manifest: Manifest
    steps: Sequence[int]

    @property
    def images(self) -> list[int]:
        return sorted(self.manifest.images)

    @property
    def prompts(self) -> list[str]:
        return [str(self.manifest.images[i].prompt) for i in self.images]

    @property
    def image_hashes(self) -> list[str | None]:
        return image_hashes(self.data_dir, self.manifest, self.images)

    def states(self) -> StoredStates:
        return StoredStates(self.data_dir, self.manifest, self.images, self.steps)


@contextmanager
def rounded_to_bfloat16(model: DiffusionModel) -> Iterator[None]:
    """Round the transformer's weights and its input states to bfloat16 for the time of the context.

    Forward passes are computed in float32. Differences below this noise floor are not significant. Weights take twice
    the memory of a 16-bit model meanwhile.
    """
    dtype, point = model.dtype, TapPoint(model.architecture.input_layer, "")
    try:
        model.dtype = mx.float32
        with (
            model.changed(lambda _, weight: _rounded(weight)),
            tapped(model.architecture, [point], lambda _, x: _rounded(x)),
        ):
            yield
    finally:
        model.dtype = dtype


def _rounded(array: mx.array) -> mx.array:
    return array.astype(mx.bfloat16).astype(mx.float32)


class Paired:
    """Comparisons of a model in changed forms with the same model at full precision.

    Pairs of pictures are compared by the ``measures`` besides PSNR and SSIM. Of a reference of more than :data:`KEPT`
    images nothing is kept in memory from one block of them to the next.
    """

    def __init__(self, model: DiffusionModel, reference: Reference, measures: Chosen = NONE):
        self._model, self._reference, self.measures = model, reference, measures
        manifest = reference.manifest
        guidance = manifest.cfg_weight > 0
        self._memory = plan_memory(model, guidance, manifest.batch_size, parts=manifest.parts)
        # One step per batch, as a quantized model may depend on the step.
        self._at_once = plan_memory(model, guidance).batch_size
        self._pictures: dict[int, Picture] = {}
        self._exact: dict[tuple[int, int], NDArray[np.float32]] = {}

    def pictures(self, images: Sequence[int]) -> NDArray[np.float32]:
        """The reference's, (images, height, width, 3) in [0, 1], not rounded to 8 bits."""
        missing = [image for image in images if image not in self._pictures]
        manifest, found = self._reference.manifest, dict(self._pictures)
        if missing:
            final = read_states(self._reference.data_dir, manifest, missing, manifest.num_steps)
            with shared_cores((manifest.batch_size or 1) * (2 if manifest.cfg_weight > 0 else 1), manifest.parts):
                found |= zip(missing, self._model.decode_each(mx.array(final), self._memory.decoders), strict=True)
        if len(self._reference.images) <= KEPT:
            self._pictures = found
        return np.stack([found[image] for image in images])

    def compare(self, change: Change, label: str, images: Sequence[int] | None = None, see: See = unseen) -> Fidelity:
        """Draw the reference's ``images``, or all, with the model changed, and compare pictures and outputs.

        Args:
            see: is given each block of pictures, the reference's and the changed model's, in order.
        """
        chosen = self._reference.images if images is None else list(images)
        values: dict[str, list[NDArray[np.float64]]] = {}
        for block, drawn in self._drawn(change, label, chosen):
            exact = self.pictures(block)
            for name, of_block in self._of_pairs(exact, drawn, block).items():
                values.setdefault(name, []).append(of_block)
            see(exact, drawn)
        own = {name: np.concatenate(blocks) for name, blocks in values.items()}
        return Fidelity(
            psnr=own.pop("psnr"),
            ssim=own.pop("ssim"),
            error=self._output_errors(change, label, chosen),
            steps=np.array(self._reference.steps),
            further=own,
        )

    def _of_pairs(self, exact: Pictures, drawn: Pictures, images: Sequence[int]) -> dict[str, NDArray[np.float64]]:
        """Values of each measure of pairs, by image."""
        pairs = list(zip(exact, drawn, strict=True))
        texts = [str(self._reference.manifest.images[image].prompt) for image in images]
        found = {name: np.array([metric(*pair) for pair in pairs]) for name, metric in ALWAYS.items()}
        return found | self.measures.of_pairs(pairs, texts)

    def _drawn(self, change: Change, label: str, images: list[int]) -> Iterator[tuple[list[int], Pictures]]:
        """Draw ``images``; all of them in the blocks of the reference, as another batch size would differ by rounding.

        A few of them fill their batch without padding.
        """
        model, manifest, guidance = self._model, self._reference.manifest, self._reference.manifest.cfg_weight
        size = manifest.batch_size or 1
        size = size if images == self._reference.images else min(size, len(images))
        blocks = [images[i : i + size] for i in range(0, len(images), size)]
        rows = [block + block[:1] * (size - len(block)) for block in blocks]
        shown = [[str(manifest.images[i].prompt) for i in row] for row in rows]
        texts = model.encode_batches(shown, guidance, self._memory.keep_text)
        with Progress(f"draw {label}", len(blocks) * manifest.num_steps, "step") as progress:
            for block, row, text in zip(blocks, rows, texts, strict=True):
                seeds = [manifest.images[i].seed or 0 for i in row]
                with shared_cores(len(text.tokens), manifest.parts):
                    with change():
                        drawn = trajectory_from(model, text, seeds, manifest.num_steps, guidance, manifest.parts)
                        for state in drawn:
                            if state.step_index:
                                progress.advance()
                    decoded = model.decode_each(state.x[: len(block)], self._memory.decoders)
                yield block, decoded

    def _output_errors(self, change: Change, label: str, images: list[int]) -> NDArray[np.float64]:
        """Relative error of the outputs on the states of ``images``, over both guidance halves, (images, steps)."""
        reference, at_once = self._reference, KEPT
        errors = np.zeros((len(images), len(reference.steps)))
        column = {step: i for i, step in enumerate(reference.steps)}
        parts = [images[i : i + at_once] for i in range(0, len(images), at_once)]
        batches = [replace(reference.states(), images=part).batches(self._model, self._at_once) for part in parts]
        place = {image: row for row, image in enumerate(images)}
        with Progress(f"compare outputs, {label}", sum(map(len, batches)), "forward", delay=2) as progress:
            for own in batches:
                exact = self._exact_outputs(own)
                with change():
                    for make in own:
                        batch = make()
                        rows, step = [place[image] for image in batch.images], batch.steps[0]
                        v = np.stack([exact[image, step] for image in batch.images])
                        errors[rows, column[step]] = relative_error(v, _output(self._model, batch))
                        progress.advance()
        return errors

    def _exact_outputs(self, batches: Sequence[LazyBatch]) -> dict[tuple[int, int], NDArray[np.float32]]:
        """Outputs at full precision by image and step: one latent per state."""
        found = dict(self._exact)
        for make in batches:
            batch = make()
            states = list(zip(batch.images, batch.steps, strict=True))
            if not found.keys() >= set(states):
                found |= zip(states, _output(self._model, batch), strict=True)
        if len(self._reference.images) <= KEPT:
            self._exact = found
        return found


def _output(model: DiffusionModel, batch: Batch) -> NDArray[np.float32]:
    """The model's outputs, (states, guidance halves, height, width, channels)."""
    with shared_cores(len(batch.x)):
        output = output_of(model, batch).astype(mx.float32)
        mx.eval(output)
    halves = np.array(output).reshape(-1, len(batch.images), *output.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(0, 1))
