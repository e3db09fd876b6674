"""Draw the same images with a changed model, and compare; the model's output on the same states, step by step.

The reference is a dataset drawn at full precision: its prompts, seeds and noise, its final latents, its states.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from calib.activations.batches import Batch, StoredStates, output_of
from calib.activations.replay import shared_cores
from calib.activations.states import read_states
from calib.activations.taps import TapPoint, tapped
from calib.dataset.generate import trajectory_from
from calib.dataset.manifest import Manifest
from calib.evaluation.metrics import Fidelity, psnr, relative_error, ssim
from calib.models.memory import plan_memory
from calib.models.model import DiffusionModel, weights
from calib.progress import Progress

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten
from numpy.typing import NDArray

#: A change of the model for the time of a context.
Change = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Reference:
    """A dataset drawn by the full-precision model, all its images; output errors are compared at ``steps``."""

    data_dir: Path
    manifest: Manifest
    steps: Sequence[int]

    @property
    def images(self) -> list[int]:
        return sorted(self.manifest.images)

    @property
    def prompts(self) -> list[str]:
        return [str(self.manifest.images[i].prompt) for i in self.images]

    def states(self) -> StoredStates:
        return StoredStates(self.data_dir, self.manifest, self.images, self.steps)

    def pictures(self, model: DiffusionModel) -> NDArray[np.float32]:
        """The pictures of the final states, (images, height, width, 3) in [0, 1], not rounded to 8 bits."""
        final = read_states(self.data_dir, self.manifest, self.images, self.manifest.num_steps)
        return np.stack([np.array(model.decode(mx.array(latent[None])))[0] for latent in final])


@dataclass(frozen=True)
class Outcome:
    """What a changed model drew, (images, height, width, 3), and how it compares."""

    pictures: NDArray[np.float32]
    fidelity: Fidelity


@contextmanager
def rounded_to_bfloat16(model: DiffusionModel) -> Iterator[None]:
    """Within the context the transformer's weights are rounded to bfloat16, and the states it is given, too.

    Computed in the model's own type: the noise floor below which differences say nothing (METHODS §8).
    """
    own = weights(model.transformer)
    rounded = [(path, _rounded(array)) for path, array in own.items()]
    try:
        model.transformer.update(tree_unflatten(rounded))
        with tapped(model.transformer, [TapPoint("x_embedder", "")], lambda _, x: _rounded(x)):
            yield
    finally:
        model.transformer.update(tree_unflatten(list(own.items())))


def _rounded(array: mx.array) -> mx.array:
    return array.astype(mx.bfloat16).astype(array.dtype)


def compare(model: DiffusionModel, reference: Reference, change: Change, label: str) -> Outcome:
    """Draw the images of ``reference`` again with ``model`` changed, and compare pictures and outputs."""
    pictures = _draw(model, reference, change, label)
    pairs = list(zip(reference.pictures(model), pictures, strict=True))
    fidelity = Fidelity(
        psnr=np.array([psnr(*pair) for pair in pairs]),
        ssim=np.array([ssim(*pair) for pair in pairs]),
        error=_output_errors(model, reference, change, label),
        steps=np.array(reference.steps),
    )
    return Outcome(pictures, fidelity)


def _draw(model: DiffusionModel, reference: Reference, change: Change, label: str) -> NDArray[np.float32]:
    """The pictures, drawn in the blocks in which the reference was: another batch size would differ by rounding."""
    manifest, images = reference.manifest, reference.images
    size, guidance = manifest.batch_size or 1, manifest.cfg_weight
    blocks = [images[i : i + size] for i in range(0, len(images), size)]
    rows = [block + block[:1] * (size - len(block)) for block in blocks]
    memory = plan_memory(model, guidance > 0, size)
    texts = model.encode_batches(
        [[str(manifest.images[i].prompt) for i in row] for row in rows], guidance, memory.keep_text
    )
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


def _output_errors(model: DiffusionModel, reference: Reference, change: Change, label: str) -> NDArray[np.float64]:
    """Relative error of the output on the reference's states, both guidance halves together, (images, steps)."""
    manifest, states = reference.manifest, reference.states()
    size = plan_memory(model, manifest.cfg_weight > 0).batch_size
    batches = states.batches(model, size)
    place = {image: row for row, image in enumerate(reference.images)}
    column = {step: i for i, step in enumerate(reference.steps)}
    errors = np.zeros((len(place), len(column)))
    with Progress(f"compare outputs, {label}", len(batches), "batch", delay=2) as progress:
        for make in batches:
            batch = make()
            exact = _output(model, batch)
            with change():
                changed = _output(model, batch)
            rows = [place[image] for image in batch.images]
            errors[rows, column[batch.steps[0]]] = relative_error(_by_state(exact, batch), _by_state(changed, batch))
            progress.advance()
    return errors


def _output(model: DiffusionModel, batch: Batch) -> NDArray[np.float32]:
    with shared_cores(len(batch.x)):
        output = output_of(model, batch).astype(mx.float32)
        mx.eval(output)
    return np.array(output)


def _by_state(rows: NDArray[np.float32], batch: Batch) -> NDArray[np.float32]:
    """(states, guidance halves, …) of (rows, …)."""
    halves = rows.reshape(-1, len(batch.images), *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(0, 1))
