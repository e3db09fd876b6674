"""Draw the same images with a changed model and compare pictures, and compare outputs on the same states by step.

The reference is a dataset drawn at full precision, with its prompts, seeds, noise, final latents and states.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from calib.activations.batches import Batch, StoredStates, output_of
from calib.activations.replay import shared_cores
from calib.activations.states import image_hashes, read_states
from calib.activations.taps import TapPoint, tapped
from calib.base.progress import Progress
from calib.dataset.generate import trajectory_from
from calib.dataset.manifest import Manifest
from calib.evaluation.metrics import Fidelity, psnr, relative_error, ssim
from calib.models.memory import plan_memory
from calib.models.model import DiffusionModel, weights

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten
from numpy.typing import NDArray

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
    own, dtype = weights(model.transformer), model.dtype
    rounded = [(path, _rounded(array)) for path, array in own.items()]
    try:
        model.transformer.update(tree_unflatten(rounded))
        model.dtype = mx.float32
        with tapped(model.architecture, [TapPoint(model.architecture.input_layer, "")], lambda _, x: _rounded(x)):
            yield
    finally:
        model.dtype = dtype
        model.transformer.update(tree_unflatten(list(own.items())))


def _rounded(array: mx.array) -> mx.array:
    return array.astype(mx.bfloat16).astype(mx.float32)


class Paired:
    """Comparisons of a model in changed forms with the same model at full precision.

    Attributes:
        pictures: pictures of the reference, (images, height, width, 3) in [0, 1], not rounded to 8 bits.
    """

    def __init__(self, model: DiffusionModel, reference: Reference):
        self._model, self._reference = model, reference
        manifest = reference.manifest
        final = read_states(reference.data_dir, manifest, reference.images, manifest.num_steps)
        self.pictures = np.stack([np.array(model.decode(mx.array(latent[None])))[0] for latent in final])
        # One step per batch, as a quantized model may depend on the step.
        size = plan_memory(model, manifest.cfg_weight > 0).batch_size
        self._batches = reference.states().batches(model, size)
        self._exact: list[NDArray[np.float32]] = []

    def compare(self, change: Change, label: str) -> Outcome:
        """Draw the reference's images with the model changed, and compare pictures and outputs."""
        pictures = self._draw(change, label)
        pairs = list(zip(self.pictures, pictures, strict=True))
        fidelity = Fidelity(
            psnr=np.array([psnr(*pair) for pair in pairs]),
            ssim=np.array([ssim(*pair) for pair in pairs]),
            error=self._output_errors(change, label),
            steps=np.array(self._reference.steps),
        )
        return Outcome(pictures, fidelity)

    def _draw(self, change: Change, label: str) -> NDArray[np.float32]:
        """Draw the pictures in the blocks of the reference, as another batch size would differ by rounding."""
        model, manifest, images = self._model, self._reference.manifest, self._reference.images
        size, guidance = manifest.batch_size or 1, manifest.cfg_weight
        blocks = [images[i : i + size] for i in range(0, len(images), size)]
        rows = [block + block[:1] * (size - len(block)) for block in blocks]
        shown = [[str(manifest.images[i].prompt) for i in row] for row in rows]
        texts = model.encode_batches(shown, guidance, plan_memory(model, guidance > 0, size).keep_text)
        pictures = []
        with Progress(f"draw {label}", len(blocks) * manifest.num_steps, "step") as progress:
            for block, row, text in zip(blocks, rows, texts, strict=True):
                seeds = [manifest.images[i].seed or 0 for i in row]
                with change():
                    for state in trajectory_from(model, text, seeds, manifest.num_steps, guidance):
                        if state.step_index:
                            progress.advance()
                pictures += [np.array(model.decode(state.x[i : i + 1]))[0] for i in range(len(block))]
        return np.stack(pictures)

    def _output_errors(self, change: Change, label: str) -> NDArray[np.float64]:
        """Relative error of the outputs on the reference's states, over both guidance halves, (images, steps)."""
        reference = self._reference
        place = {image: row for row, image in enumerate(reference.images)}
        column = {step: i for i, step in enumerate(reference.steps)}
        errors = np.zeros((len(place), len(column)))
        with Progress(f"compare outputs, {label}", len(self._batches), "forward", delay=2) as progress:
            exact = self._exact_outputs()
            with change():
                for make, v in zip(self._batches, exact, strict=True):
                    batch = make()
                    rows = [place[image] for image in batch.images]
                    errors[rows, column[batch.steps[0]]] = relative_error(v, _output(self._model, batch))
                    progress.advance()
        return errors

    def _exact_outputs(self) -> list[NDArray[np.float32]]:
        """Outputs at full precision by batch, computed once and kept: one latent per state."""
        if not self._exact:
            self._exact = [_output(self._model, make()) for make in self._batches]
        return self._exact


def _output(model: DiffusionModel, batch: Batch) -> NDArray[np.float32]:
    """The model's outputs, (states, guidance halves, height, width, channels)."""
    with shared_cores(len(batch.x)):
        output = output_of(model, batch).astype(mx.float32)
        mx.eval(output)
    halves = np.array(output).reshape(-1, len(batch.images), *output.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(0, 1))
