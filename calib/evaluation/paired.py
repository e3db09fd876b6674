"""Draw the same images with a changed model and compare pictures, and compare outputs on the same states by step.

The reference is a dataset drawn at full precision, with its prompts, seeds, noise, final latents and states.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from calib.activations.batches import Batch, LazyBatch, StoredStates, output_of
from calib.activations.states import image_hashes, read_states
from calib.activations.taps import TapPoint, tapped
from calib.base.progress import Progress
from calib.dataset.generate import trajectory_from
from calib.dataset.manifest import Manifest
from calib.evaluation.measures import BATCH, NONE, Chosen
from calib.evaluation.metrics import Fidelity, psnr, relative_error, ssim
from calib.models.memory import plan_memory
from calib.models.model import DiffusionModel
from calib.models.parallel import shared_cores

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

#: What is always measured of pairs of pictures.
ALWAYS = {"psnr": psnr, "ssim": ssim}
#: Returns a context in which the model is changed.
Change = Callable[[], AbstractContextManager[None]]


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


@dataclass(frozen=True)
class Outcome:
    """Pictures of a changed model, (images, height, width, 3), and their fidelity."""

    pictures: NDArray[np.float32]
    fidelity: Fidelity


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

    Pairs of pictures are compared by the ``measures`` besides PSNR and SSIM.

    Attributes:
        pictures: pictures of the reference, (images, height, width, 3) in [0, 1], not rounded to 8 bits.
        measures: the further ones, of pairs and of sets.
    """

    def __init__(self, model: DiffusionModel, reference: Reference, measures: Chosen = NONE):
        self._model, self._reference, self.measures = model, reference, measures
        manifest = reference.manifest
        final = read_states(reference.data_dir, manifest, reference.images, manifest.num_steps)
        guidance, parts = manifest.cfg_weight > 0, manifest.parts
        self._memory = plan_memory(model, guidance, manifest.batch_size, parts=parts)
        with shared_cores((manifest.batch_size or 1) * (2 if guidance else 1), parts):
            self.pictures = model.decode_each(mx.array(final), self._memory.decoders)
        # One step per batch, as a quantized model may depend on the step.
        self._at_once = plan_memory(model, guidance).batch_size
        self._exact: dict[tuple[int, int], NDArray[np.float32]] = {}

    def compare(self, change: Change, label: str, images: Sequence[int] | None = None) -> Outcome:
        """Draw the reference's ``images``, or all, with the model changed, and compare pictures and outputs."""
        chosen = self._reference.images if images is None else list(images)
        pictures = self._draw(change, label, chosen)
        own = self._of_pairs(pictures, label, chosen)
        fidelity = Fidelity(
            psnr=own.pop("psnr"),
            ssim=own.pop("ssim"),
            error=self._output_errors(change, label, chosen),
            steps=np.array(self._reference.steps),
            further=own,
        )
        return Outcome(pictures, fidelity)

    def _of_pairs(self, pictures: NDArray[np.float32], label: str, images: list[int]) -> dict[str, NDArray[np.float64]]:
        """Values of each measure of pairs, PSNR's and SSIM's first, a batch of pictures at a time."""
        found: dict[str, list[NDArray[np.float64]]] = {}
        rows = [self._reference.images.index(image) for image in images]
        with Progress(f"compare pictures, {label}", len(rows), "pair", delay=2) as progress:
            for start in range(0, len(rows), BATCH):
                batch = slice(start, start + BATCH)
                pairs = list(zip(self.pictures[rows[batch]], pictures[batch], strict=True))
                texts = [str(self._reference.manifest.images[image].prompt) for image in images[batch]]
                values = {name: np.array([metric(*pair) for pair in pairs]) for name, metric in ALWAYS.items()}
                for name, own in (values | self.measures.of_pairs(pairs, texts)).items():
                    found.setdefault(name, []).append(own)
                progress.advance(len(pairs))
        return {name: np.concatenate(own) for name, own in found.items()}

    def _draw(self, change: Change, label: str, images: list[int]) -> NDArray[np.float32]:
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
        pictures = []
        with Progress(f"draw {label}", len(blocks) * manifest.num_steps, "step") as progress:
            for block, row, text in zip(blocks, rows, texts, strict=True):
                seeds = [manifest.images[i].seed or 0 for i in row]
                with shared_cores(len(text.tokens), manifest.parts):
                    with change():
                        drawn = trajectory_from(model, text, seeds, manifest.num_steps, guidance, manifest.parts)
                        for state in drawn:
                            if state.step_index:
                                progress.advance()
                    pictures.append(model.decode_each(state.x[: len(block)], self._memory.decoders))
        return np.concatenate(pictures)

    def _output_errors(self, change: Change, label: str, images: list[int]) -> NDArray[np.float64]:
        """Relative error of the outputs on the states of ``images``, over both guidance halves, (images, steps)."""
        reference = self._reference
        place = {image: row for row, image in enumerate(images)}
        column = {step: i for i, step in enumerate(reference.steps)}
        errors = np.zeros((len(place), len(column)))
        batches = replace(reference.states(), images=images).batches(self._model, self._at_once)
        with Progress(f"compare outputs, {label}", len(batches), "forward", delay=2) as progress:
            self._add_exact(batches)
            with change():
                for make in batches:
                    batch = make()
                    rows, step = [place[image] for image in batch.images], batch.steps[0]
                    exact = np.stack([self._exact[image, step] for image in batch.images])
                    errors[rows, column[step]] = relative_error(exact, _output(self._model, batch))
                    progress.advance()
        return errors

    def _add_exact(self, batches: Sequence[LazyBatch]) -> None:
        """Compute outputs at full precision where they are not kept yet: one latent per state."""
        for make in batches:
            batch = make()
            states = list(zip(batch.images, batch.steps, strict=True))
            if not self._exact.keys() >= set(states):
                self._exact |= zip(states, _output(self._model, batch), strict=True)


def _output(model: DiffusionModel, batch: Batch) -> NDArray[np.float32]:
    """The model's outputs, (states, guidance halves, height, width, channels)."""
    with shared_cores(len(batch.x)):
        output = output_of(model, batch).astype(mx.float32)
        mx.eval(output)
    halves = np.array(output).reshape(-1, len(batch.images), *output.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(0, 1))
