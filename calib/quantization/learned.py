"""Quantizer ``learned``: the grids of ``gptq``, and integers if wished, trained against the pictures they draw.

End to end, through the sampler: the loss of :mod:`calib.quantization.training.pictures` for prompts and fresh noise, in
fewer steps than the user's sampler has. Roundings are trained as by AutoRound (arXiv 2309.05516), scales and biases as
by DWQ (mlx-lm); size and format stay those of the plan. Of some calibration images, held out, the best is kept.
"""

import hashlib
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from calib.activations.batches import StoredStates
from calib.activations.states import read_states
from calib.base.device import on_gpu
from calib.base.errors import CalibError, ConfigError
from calib.base.files import remove_abandoned, short_hash
from calib.base.locks import locked
from calib.base.progress import Progress, say
from calib.base.seeds import generator
from calib.models.model import DiffusionModel
from calib.models.packed import Packed
from calib.quantization import gptq
from calib.quantization.quantizer import Quantized, QuantizerInput
from calib.quantization.texts import drawn_from, others, prompts_of
from calib.quantization.training.pictures import Drawn, PictureLoss, picture_loss, plan_pictures, psnr_of
from calib.quantization.training.trainable import Parameters, Trainable
from calib.quantization.training.trained import Trained, adam
from calib.quantization.unfinished import unfinished

import mlx.core as mx
import numpy as np

#: How often a training is compared with its best, and saved.
CHECKS = 6
#: Pictures of an update where their number is not given: at least so many, and at most.
FEWEST, MOST = 4, 48
#: Held-out images where their number is not given, of a set that has three times as many.
LEAST_HELD_OUT = 8
#: Arrays of the parameters' sizes that are held: now, the best, a gradient, and Adam's two.
HELD = 5
#: Of the procedure; to be raised where it makes something else of the same work.
VERSION = 4


@dataclass(frozen=True)
class Training:
    """How the layers are trained; see :func:`quantize`."""

    updates: int
    batch_size: int | None
    num_steps: int
    rate: float
    rounding: bool
    held_out: int | None
    pictures: int
    prompts: int | None
    seed: int

    def check(self) -> None:
        """Raise where a value is out of range."""
        for key, holds, allowed in (
            ("updates", self.updates >= 0, "must be 0 (gptq alone) or more"),
            ("batch_size", self.batch_size is None or self.batch_size >= 1, "must be 1 or more, or null"),
            ("num_steps", self.num_steps >= 2, "must be 2 or more"),
            ("rate", 0 < self.rate <= 1, "must be more than 0, and 1 at most"),
            ("held_out", self.held_out is None or self.held_out >= 1, "must be 1 or more, or null"),
            ("pictures", self.pictures >= 0, "must be 0 or more"),
            ("prompts", self.prompts is None or self.prompts >= 0, "must be 0 or more, or null"),
            ("seed", self.seed >= 0, "must be 0 or more"),
        ):
            if not holds:
                raise ConfigError.bad_value(f"quantizer.{key}", getattr(self, key), allowed)


def quantize(
    work: QuantizerInput,
    updates: int = 60,
    batch_size: int | None = None,
    num_steps: int = 10,
    rate: float = 2e-3,
    rounding: bool = True,
    held_out: int | None = None,
    pictures: int = 64,
    prompts: int | None = None,
    seed: int = 0,
) -> Quantized:
    """Train what ``gptq`` makes until its pictures are nearest those of full precision; never worse than its start.

    Where ``work.scratch`` is a folder, an interrupted training goes on there to the same bits; other parameters are
    another training.

    Args:
        updates: of the parameters, each by ``batch_size`` new pictures; None: as many as a GPU's memory has room for at
            once, 4 to 48, and 4 on a CPU.
        num_steps: steps of the sampler in training, those of the dataset at most; a fifth more or less. As many as
            pictures need to look alike.
        rate: the largest change of a bias in units of its scale at an update; of an integer before rounding three times
            that, of a scale a tenth of it, relative to itself.
        rounding: train integers too, not scales and biases alone: the larger part of what is gained, for four more
            numbers in float32 a weight in memory.
        held_out: collected images, the last ones, by which the best is chosen; they are not trained on. None: as many
            as an update draws, 8 at least, but a third of them at most. By 8 a gain of 1 dB can be missed.
        pictures: of ``gptq``, with which it starts.
        prompts: further texts to draw beside those of the images, so many of ``work.prompts()``; None: all. With few
            the training learns their pictures by heart.
        seed: of the pictures drawn in training.

    Raises:
        ConfigError: an argument is out of range.
        CalibError: there is no dataset to draw from, it has too few images to hold some out, or a gradient is not
            finite at the start.
    """
    training = Training(updates, batch_size, num_steps, rate, rounding, held_out, pictures, prompts, seed)
    training.check()
    work.refuse_streamed("gradients of pictures, by which quantizer=learned trains,")
    if not work.layers:
        return Quantized({})
    model, states = drawn_from(work)
    if batch_size is None:
        batch_size = _batch_size(work, model, states.manifest.cfg_weight, rounding)
    images = [*states.images, *states.others]
    if held_out is None:
        held_out = images_held_out(batch_size, len(images))
    if len(images) <= held_out:
        raise CalibError(
            f"quantizer.held_out={held_out}: of {len(images)} collected images none is left to train on; "
            "collect more (num_images), or hold out fewer"
        )
    if lacking := [i for i in images[-held_out:] if states.manifest.images[i].seed is None]:
        raise CalibError(f"{states.data_dir}: the seed of image {lacking[0]}, which is to be drawn again, is unknown")
    states.manifest.row(states.manifest.num_steps)  # finished latents are compared
    training = replace(training, batch_size=batch_size, held_out=held_out)
    with unfinished(work, "learned", asdict(training)):
        start = gptq.quantize(work, pictures=pictures)
        if not updates:
            return start
        made, notes, drawn = _Trainer(work, model, states, start.layers, training).train()
    return replace(start, layers=made, notes=[*start.notes, *notes], drawn=[*start.drawn, *drawn])


def images_held_out(batch_size: int, images: int) -> int:
    """Number of ``images`` by which the best is chosen, where it is not given."""
    return max(1, min(max(batch_size, LEAST_HELD_OUT), images // 3))


def _beside(work: QuantizerInput, rounding: bool) -> int:
    """Bytes of the parameters in float32, as often as they are held."""
    groups = {name: layer.weight.size // work.plan[name].group_size for name, layer in work.layers.items()}
    return HELD * 4 * sum(2 * n + rounding * work.layers[name].weight.size for name, n in groups.items())


def _batch_size(work: QuantizerInput, model: DiffusionModel, guidance: float, rounding: bool) -> int:
    """Pictures of an update, by this device."""
    if not on_gpu():
        return FEWEST
    plan = plan_pictures(model, work.layers, guidance, MOST, _beside(work, rounding))
    return max(FEWEST, plan.batch_size)


class _Trainer:
    """Trains ``start``, packed layers by name."""

    def __init__(
        self,
        work: QuantizerInput,
        model: DiffusionModel,
        states: StoredStates,
        start: dict[str, Packed],
        training: Training,
    ):
        self._work, self._model, self._training, self._states = work, model, training, states
        images = [*states.images, *states.others]
        assert training.batch_size is not None and training.held_out is not None
        self._held = images[-training.held_out :]
        self._texts = [*prompts_of(states, images[: -training.held_out]), *self._others()]
        self._layers = {name: Trainable.of(packed, training.rounding) for name, packed in start.items()}
        self._start = start
        self._guidance = states.manifest.cfg_weight
        self._size = training.batch_size

    def _others(self) -> list[str]:
        """Texts that no image has, as many as are wanted."""
        found, wanted = others(self._work, self._states), self._training.prompts
        if wanted is None or wanted >= len(found):
            return found
        chosen = generator("quantizer.seed", self._training.seed).choice(len(found), wanted, replace=False)
        return [found[i] for i in sorted(chosen)]

    def train(self) -> tuple[dict[str, Packed], list[str], set[str]]:
        """The layers with the best held-out pictures, notes, and the texts that these were trained on."""
        if (path := self._path()) is None:
            return self._train(None)
        with locked(path.with_suffix(".lock"), lambda: say(f"waiting for the process that trains the same ({path})")):
            return self._train(path)

    def _train(self, path: Path | None) -> tuple[dict[str, Packed], list[str], set[str]]:
        training, notes = self._training, list[str]()
        checked = {training.updates * (i + 1) // CHECKS for i in range(CHECKS)}
        trained = path and Trained.load(path)
        left = training.updates - (trained.updates if trained else 0)
        with self._pictures() as loss, Progress("learn", left, "update", delay=2) as progress:
            trained = trained or self._begin(loss)
            optimizer = adam(training.rate, training.updates)
            optimizer.state = trained.optimizer or optimizer.state
            while trained.updates < training.updates:
                gradients = self._gradients(loss, trained)
                if gradients is None:
                    notes.append(f"the loss of update {trained.updates + 1} is not finite: the best before it is kept")
                    break
                trained.now = optimizer.apply_gradients(gradients, trained.now)
                trained.optimizer, trained.updates = optimizer.state, trained.updates + 1
                mx.eval(trained.now, trained.optimizer)
                progress.advance()
                if trained.updates in checked:
                    trained.measured(self._held_out(loss, trained.now))
                    if path is not None:
                        trained.save(path)
                    before, best = trained.psnr[0], trained.psnr[trained.best_updates]
                    progress.describe(f"{before:.2f} dB at the start, {best:.2f} at best")
        drawn = {text for update in range(trained.best_updates) for text in self._chosen(update).prompts}
        return self._finished(trained), [*notes, self._summary(trained)], drawn

    def _pictures(self) -> AbstractContextManager[PictureLoss]:
        beside = _beside(self._work, self._training.rounding)
        return picture_loss(self._model, self._work.layers, self._guidance, self._size, beside)

    def _begin(self, loss: PictureLoss) -> Trained:
        own = self._work.layers
        parameters = {name: layer.start(own[name].weight) for name, layer in self._layers.items()}
        mx.eval(parameters)
        trained = Trained(parameters, parameters)
        trained.measured(self._held_out(loss, parameters))
        return trained

    def _gradients(self, loss: PictureLoss, trained: Trained) -> dict[str, Parameters] | None:
        """Gradients by the parameters of the next update; None where they are not finite."""
        weights = {name: layer.weight(trained.now[name]) for name, layer in self._layers.items()}
        mx.eval(weights)
        try:
            _, found = loss.gradients(self._chosen(trained.updates), weights)
        except CalibError:
            if not trained.updates:
                raise
            return None
        gradients = {name: layer.gradients(trained.now[name], found[name]) for name, layer in self._layers.items()}
        return gradients

    def _chosen(self, update: int) -> Drawn:
        """The pictures of an update: texts, fresh noise, and a number of steps."""
        training, random = self._training, generator("quantizer.seed", self._training.seed, update)
        chosen = random.choice(len(self._texts), self._size, replace=len(self._texts) < self._size)
        num_steps = min(training.num_steps, self._states.manifest.num_steps)  # some models draw in four
        fifth = num_steps // 5
        return Drawn(
            [self._texts[i] for i in chosen],
            random.randint(1 << 31, size=self._size).tolist(),
            int(random.randint(num_steps - fifth, num_steps + fifth + 1)),
        )

    def _held_out(self, loss: PictureLoss, parameters: dict[str, Parameters]) -> float:
        """Mean PSNR of the held-out pictures, in the dataset's number of steps, dB."""
        weights = {name: layer.weight(parameters[name]) for name, layer in self._layers.items()}
        mx.eval(weights)
        manifest, size, errors = self._states.manifest, self._size, []
        for first in range(0, len(self._held), size):
            images = self._held[first : first + size]
            exact = mx.array(read_states(self._states.data_dir, manifest, images, manifest.num_steps))
            seeds = [manifest.images[i].seed or 0 for i in images]
            drawn = loss.draw(Drawn(prompts_of(self._states, images), seeds, manifest.num_steps), weights)
            errors += loss.errors(exact.astype(mx.float32), drawn[-1])
        return float(np.mean([psnr_of(error) for error in errors]))

    def _finished(self, trained: Trained) -> dict[str, Packed]:
        if not trained.best_updates:
            return self._start
        return {name: layer.finished(trained.best[name]) for name, layer in self._layers.items()}

    def _summary(self, trained: Trained) -> str:
        count, start = f"{len(self._held)} held-out calibration pictures", trained.psnr[0]
        if not trained.best_updates:
            return f"learned: no update made the {count} better than gptq's ({start:.2f} dB), which stays"
        best = trained.psnr[trained.best_updates]
        return f"learned: {count} from {start:.2f} to {best:.2f} dB, after {trained.best_updates} of {trained.updates}"

    def _path(self) -> Path | None:
        """The file of what is done, by what that depends on beside weights, states and statistics: its start, too."""
        if self._work.scratch is None:
            return None
        plan = {name: asdict(self._work.plan[name]) for name in self._work.layers}
        remove_abandoned(self._work.scratch)  # what a killed process was writing
        start = hashlib.sha256()
        for packed in self._start.values():
            for array in (packed.weight, packed.scales.view(mx.uint16), packed.biases.view(mx.uint16)):
                start.update(np.ascontiguousarray(np.array(array)).data)
        own = [asdict(self._training), self._texts]
        key = short_hash(["learned", VERSION, own, start.hexdigest(), plan], digits=16)
        return self._work.scratch / f"{key}.safetensors"
