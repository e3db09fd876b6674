"""Find the inputs of a later stage: a run's statistics, the dataset they were collected from, a plan, a model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from calib.activations.batches import StoredStates
from calib.base.errors import CalibError, ConfigError, lacks_or_garbles
from calib.base.files import read_json
from calib.base.layout import ACTIVATIONS, METADATA, MODEL, PLAN, STATISTICS
from calib.dataset.check_model import checked_model
from calib.dataset.load import load_manifest
from calib.dataset.manifest import MANIFEST, Manifest
from calib.dataset.timesteps import evenly
from calib.models.model import DiffusionModel
from calib.quantization.checkpoint import CHECKPOINT
from calib.stages import Stage
from calib.stages.settings import Settings


@dataclass(frozen=True)
class Collected:
    """A dataset, and the images and steps of it that a run collected.

    Attributes:
        steps: collected steps that the sampler feeds to the model.
    """

    data_dir: Path
    manifest: Manifest
    images: list[int]
    steps: list[int]

    def states(self, images: int, steps: int) -> StoredStates:
        """States of the first ``images`` images at ``steps`` evenly spaced steps, the first and last among them."""
        chosen = [self.steps[i] for i in evenly(len(self.steps) - 1, steps)]
        return StoredStates(self.data_dir, self.manifest, self.images[:images], chosen)

    def model(self, load: Callable[[], DiffusionModel]) -> Callable[[], DiffusionModel]:
        """A loader that calls ``load`` once and raises where the model cannot have drawn the dataset."""
        return checked_model(self.data_dir, self.manifest, load)


def collected(settings: Settings, stats: Path, why: str) -> Collected:
    """The dataset that the run directory ``stats`` was collected from; ``why`` names what needs it, for errors.

    Raises:
        ConfigError: ``stats`` is no run directory, or the dataset is no longer there.
        CalibError: the run's metadata are damaged, or the dataset lacks an image.
    """
    if not (stats / METADATA).exists():
        raise ConfigError(f"stats={stats}: {why} replays stored states: name a run directory of calib collect")
    document = read_json(stats / METADATA)
    try:
        recorded = Path(document["data_dir"])
        images = [int(i) for i in document["image_ids"]]
        steps = [int(s["step_index"]) for s in document["steps"] if s["evaluated_by_sampler"]]
    except (KeyError, TypeError, ValueError) as error:
        raise lacks_or_garbles(stats / METADATA, error, "run calib collect again") from None
    own = settings.generate
    data_dir = own.data_dir if settings.stage is Stage.RUN else own.given_data_dir or recorded
    if not (data_dir / MANIFEST).exists():
        raise ConfigError(f"{why} replays stored states, and {data_dir} holds no dataset; name it with data_dir=DIR")
    manifest = load_manifest(data_dir)
    if lacking := [i for i in images if i not in manifest.images]:
        raise CalibError(f"{data_dir}: lacks image {lacking[0]}, which {stats} was collected from")
    if not steps:
        raise CalibError(f"{stats}: only the finished latent was collected, which the model never sees; collect others")
    return Collected(data_dir, manifest, images, steps)


def activations_of(stats: Path) -> Path | None:
    """The ``activations.h5`` of ``stats``, a run directory or such a file; None where there is none."""
    path = stats / ACTIVATIONS if stats.is_dir() else stats
    return path if path.suffix == ".h5" and path.exists() else None


def stats_of(settings: Settings) -> Path:
    """The path given by ``stats=``; raises where it is not set."""
    if settings.analyze.stats is None:
        raise ConfigError(f"stats is not set: name a run directory or a {STATISTICS}, calib analyze stats=DIR")
    return settings.analyze.stats


def plan_of(settings: Settings) -> Path:
    """The file of the plan given by ``plan=``; raises where there is none."""
    given = settings.quantize.plan
    if given is None:
        raise ConfigError(f"plan is not set: name a run directory or a {PLAN}, plan=DIR")
    path = given / PLAN if given.is_dir() else given
    if not path.exists():
        raise ConfigError(f"plan={given}: no {PLAN} there; calib analyze makes one")
    return path


def quantized_of(settings: Settings) -> Path:
    """The folder of the quantized model in the run directory given by ``plan=``; raises where there is none."""
    given = settings.quantize.plan
    if given is None:
        raise ConfigError("plan is not set: name the run directory of calib quantize, calib evaluate plan=DIR")
    folder = given / MODEL
    if not (folder / CHECKPOINT).is_file():
        raise ConfigError(f"plan={given}: no quantized model there; calib quantize plan={given} makes one")
    return folder
