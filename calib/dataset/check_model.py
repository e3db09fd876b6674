"""Check that a model can have drawn a dataset."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from calib.base.errors import CalibError
from calib.dataset.manifest import Manifest
from calib.models.model import DiffusionModel


def checked_model(
    data_dir: Path, manifest: Manifest, model: Callable[[], DiffusionModel]
) -> Callable[[], DiffusionModel]:
    """A loader that calls ``model`` once and raises where the loaded model cannot have drawn the dataset."""

    @cache
    def checked() -> DiffusionModel:
        loaded = model()
        check_model(data_dir, manifest, loaded)
        return loaded

    return checked


def check_model(data_dir: Path, manifest: Manifest, model: DiffusionModel) -> None:
    """Raise where ``model`` cannot have drawn the dataset; the older layout does not record the weights."""
    if manifest.fingerprint not in (None, model.fingerprint):
        raise CalibError(
            f"{data_dir}: made by {manifest.model} with other weights ({manifest.fingerprint}, not {model.fingerprint})"
        )
    if manifest.text_encoders not in (None, model.text_encoders):
        raise CalibError(
            f"{data_dir}: its prompts were encoded by {manifest.text_encoders}, not {model.text_encoders}; set the "
            "model's options as they were when it was drawn"
        )
    if manifest.latent_shape != model.latent_shape:
        raise CalibError(
            f"{data_dir}: holds latents of shape {manifest.latent_shape}, {model.name} has {model.latent_shape}; set "
            "model and sampler.image_size as they were when it was drawn"
        )
