"""What later stages go back to: the statistics of a run, and the dataset that they were collected from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from calib.activations.batches import StoredStates
from calib.activations.collect import checked_model
from calib.base.errors import CalibError, ConfigError, lacks_or_garbles
from calib.base.files import read_json
from calib.base.layout import ACTIVATIONS, METADATA, MODEL, PLAN
from calib.dataset.load import load_manifest
from calib.dataset.manifest import MANIFEST, Manifest
from calib.dataset.timesteps import evenly
from calib.models.model import DiffusionModel
from calib.quantization.checkpoint import CHECKPOINT
from calib.stages import Stage
from calib.stages.settings import Settings


@dataclass(frozen=True)
class Collected:
    """A dataset, and which of its images and steps a run collected.

    Attributes:
        steps: those that the sampler feeds to the model.
    """

    data_dir: Path
    manifest: Manifest
    images: list[int]
    steps: list[int]

    def states(self, images: int, steps: int) -> StoredStates:
        """At most so many of the images, the first, and of the steps, evenly spaced, the first and last among them."""
        chosen = [self.steps[i] for i in evenly(len(self.steps) - 1, steps)]
        return StoredStates(self.data_dir, self.manifest, self.images[:images], chosen)

    def model(self, load: Callable[[], DiffusionModel]) -> Callable[[], DiffusionModel]:
        """``load``, which raises where what it loads cannot have drawn the dataset."""
        return checked_model(self.data_dir, self.manifest, load)


def collected(settings: Settings, stats: Path, why: str) -> Collected:
    """The dataset behind the run directory ``stats``; ``why`` says who needs it.

    Raises:
        ConfigError: ``stats`` is no run directory, or the dataset is not where it was.
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
    """The ``activations.h5`` that ``stats``, a run directory or such a file, has; None where it has none."""
    path = stats / ACTIVATIONS if stats.is_dir() else stats
    return path if path.suffix == ".h5" and path.exists() else None


def stats_of(settings: Settings) -> Path:
    """What ``stats=`` names; raises where it names nothing."""
    if settings.analyze.stats is None:
        raise ConfigError("stats is not set: name a run directory or a layer_statistics.json, calib analyze stats=DIR")
    return settings.analyze.stats


def plan_of(settings: Settings) -> Path:
    """The file of the plan that ``plan=`` names; raises where there is none."""
    given = settings.quantize.plan
    if given is None:
        raise ConfigError("plan is not set: name a run directory or a quantization_config.json, plan=DIR")
    path = given / PLAN if given.is_dir() else given
    if not path.exists():
        raise ConfigError(f"plan={given}: no {PLAN} there; calib analyze makes one")
    return path


def quantized_of(settings: Settings) -> Path:
    """The folder of the quantized model that ``plan=`` names; raises where there is none."""
    given = settings.quantize.plan
    if given is None:
        raise ConfigError("plan is not set: name the run directory of calib quantize, calib evaluate plan=DIR")
    folder = given / MODEL
    if not (folder / CHECKPOINT).is_file():
        raise ConfigError(f"plan={given}: no quantized model there; calib quantize plan={given} makes one")
    return folder
