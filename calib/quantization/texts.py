"""The texts of pictures that quantizers draw."""

from collections.abc import Sequence

from calib.activations.batches import StoredStates
from calib.activations.step import prompt_of
from calib.base.errors import CalibError
from calib.models.model import DiffusionModel
from calib.quantization.quantizer import QuantizerInput


def drawn_from(work: QuantizerInput) -> tuple[DiffusionModel, StoredStates]:
    """The model to draw with, and the calibration set.

    Raises:
        CalibError: either is not known.
    """
    if work.model is None or work.states is None:
        raise CalibError("this quantizer draws pictures: name the run whose dataset is to be drawn from, stats=DIR")
    return work.model, work.states()


def prompts_of(states: StoredStates, images: Sequence[int]) -> list[str]:
    """The prompts of images of the calibration set."""
    return [prompt_of(states.data_dir, states.manifest.images[image]) for image in images]


def others(work: QuantizerInput, states: StoredStates) -> list[str]:
    """Texts of ``work.prompts()`` that no image of the dataset has."""
    known = set(prompts_of(states, list(states.manifest.images)))
    return [text for text in work.prompts() if text not in known]
