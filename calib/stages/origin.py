"""Find the inputs of a later stage: a run's statistics, the dataset they were collected from, a plan, a model."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.activations.batches import StoredStates
from calib.activations.states import image_hashes
from calib.analysis.plan_file import read_layers
from calib.analysis.steps import StepPlan, applied_hash, read_steps
from calib.base.errors import CalibError, ConfigError, lacks_or_garbles
from calib.base.files import content_of, read_json
from calib.base.layout import ACTIVATIONS, METADATA, MODEL, MODEL_CONFIG, PLAN, PRODUCTS, STATISTICS, STEPS, SUMMARY
from calib.dataset.check_model import checked_model
from calib.dataset.load import load_manifest
from calib.dataset.manifest import MANIFEST, Manifest
from calib.dataset.timesteps import evenly
from calib.models.model import DiffusionModel
from calib.quantization.checkpoint import CHECKPOINT, describe
from calib.runs.exchange import settle
from calib.runs.record import home_of
from calib.runs.standing import changed_files
from calib.stages import Stage
from calib.stages.renew import renewing
from calib.stages.settings import Settings

#: What to ask for where the defaults need stored states and there are none, by stage.
WITHOUT_STATES = {
    Stage.ANALYZE: "; analysis=sqnr and range plan from statistics alone",
    Stage.QUANTIZE: "; quantizer=rtn and fit take none",
}


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
        return StoredStates(self.data_dir, self.manifest, self.images[:images], chosen, self.images[images:])

    def model(self, load: Callable[[], DiffusionModel]) -> Callable[[], DiffusionModel]:
        """A loader that calls ``load`` once and raises where the model cannot have drawn the dataset."""
        return checked_model(self.data_dir, self.manifest, load)


def collected(settings: Settings, stats: Path, why: str) -> Collected:
    """The dataset that the run directory ``stats`` was collected from; ``why`` names what needs it, for errors.

    Raises:
        ConfigError: ``stats`` is no run directory, or the dataset is no longer there.
        CalibError: the run's metadata are damaged, or the dataset lacks an image.
    """
    instead = WITHOUT_STATES.get(settings.stage, "")
    if not (stats / METADATA).exists():
        raise ConfigError(f"stats={stats}: {why} replays stored states: name a run directory of calib collect{instead}")
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
        lost = f"{why} replays stored states, and {data_dir} holds no dataset"
        raise ConfigError(f"{lost}; name it with data_dir=DIR{instead}")
    manifest = load_manifest(data_dir)
    if lacking := [i for i in images if i not in manifest.images]:
        raise CalibError(f"{data_dir}: lacks image {lacking[0]}, which {stats} was collected from")
    _check_images(stats, document, data_dir, manifest)
    if not steps:
        raise CalibError(f"{stats}: only the finished latent was collected, which the model never sees; collect others")
    return Collected(data_dir, manifest, images, steps)


def activations_of(stats: Path) -> Path | None:
    """The ``activations.h5`` of ``stats``, a run directory or such a file; None where there is none."""
    path = stats / ACTIVATIONS if stats.is_dir() else stats
    return path if path.suffix == ".h5" and path.exists() else None


def statistics_checksum(stats: Path) -> str:
    """Checksum of the statistics in ``stats``, a run directory or a file of its.

    That of ``layer_statistics.json`` where it is there, as equal statistics make it equal to the byte.
    """
    if stats.name == ACTIVATIONS:
        stats = stats.parent
    if stats.is_dir():
        stats /= STATISTICS if (stats / STATISTICS).exists() else ACTIVATIONS
    return content_of(stats)


def check_statistics(stats: Path, data_dir: Path | None = None) -> None:
    """Raise where statistics in a run directory were changed since, or collected from other images than there are.

    ``data_dir`` is the dataset's folder, where it is not the one that the statistics name.
    """
    if changed := changed_files(stats, (STATISTICS, ACTIVATIONS)):
        renew = f"{renewing(Stage.COLLECT, stats, *_dataset(stats))} renews it"
        renew += f"; stats={stats / changed[0]} takes it alone, as it is"
        raise CalibError(f"{stats / changed[0]}: was changed after it was collected; {renew}")
    if not (stats / METADATA).exists():
        return
    document = read_json(stats / METADATA)
    if not isinstance(document, dict):
        raise CalibError(f"{stats / METADATA}: must be a JSON object; run calib collect again")
    data_dir = data_dir or Path(str(document.get("data_dir")))
    with suppress(CalibError):  # the statistics can be read without the dataset
        manifest = load_manifest(data_dir) if (data_dir / MANIFEST).exists() else None
    if manifest is not None:
        _check_images(stats, document, data_dir, manifest)


def _dataset(stats: Path) -> list[str]:
    """The override that names the dataset of statistics, where it is known."""
    document = read_json(stats / METADATA) if (stats / METADATA).exists() else None
    return [f"data_dir={document['data_dir']}"] if isinstance(document, dict) and "data_dir" in document else []


def _check_images(stats: Path, document: Mapping[str, Any], data_dir: Path, manifest: Manifest) -> None:
    """Raise where the dataset holds other images than those that ``stats`` was collected from, by their hashes."""
    ids, hashes = document.get("image_ids"), document.get("image_hashes")
    if not isinstance(ids, list) or not isinstance(hashes, list):  # of calib 0.2.0 and earlier
        return
    for image, recorded in zip(ids, hashes, strict=False):
        if image in manifest.images and recorded not in (None, *image_hashes(data_dir, manifest, [image])):
            renew = f"{renewing(Stage.COLLECT, stats, f'data_dir={data_dir}')} renews it"
            raise CalibError(f"{stats}: was collected from another image {image} than {data_dir} now holds; {renew}")


def stats_of(settings: Settings) -> Path:
    """The path given by ``stats=``; raises where it is not set."""
    if settings.analyze.stats is None:
        raise ConfigError(f"stats is not set: name a run directory or a {STATISTICS}, calib analyze stats=DIR")
    settle(settings.analyze.stats)
    return settings.analyze.stats


def plan_of(settings: Settings) -> Path:
    """The file of the plan given by ``plan=``; raises where there is none."""
    given = settings.quantize.plan
    if given is None:
        raise ConfigError(f"plan is not set: name a run directory or a {PLAN}, plan=DIR")
    settle(given)
    path = given / PLAN if given.is_dir() else given
    if not path.exists():
        raise ConfigError(f"plan={given}: no {PLAN} there; calib analyze makes one")
    return path


def statistics_of(plan: Path, steps: StepPlan, data_dir: Path | None = None) -> Path | None:
    """The run directory with the statistics of a plan, which lie beside it or are recorded with it.

    Raises:
        CalibError: the statistics are no longer those that the plan was made from.
    """
    recorded, named = steps.origin.get("statistics_checksum"), steps.origin.get("statistics")
    for stats in (plan.parent, *([] if named is None else [Path(named).parent])):
        settle(stats)
        there = [stats / name for name in (STATISTICS, ACTIVATIONS) if (stats / name).exists()]
        if there:
            check_statistics(stats, data_dir)
            if recorded is not None and all(content_of(file) != recorded for file in there):
                renew = f"{renewing(Stage.ANALYZE, plan.parent, f'stats={stats}')} renews it; stats=DIR names others"
                raise CalibError(f"{plan}: was made from other statistics than {stats} now holds; {renew}")
            return stats if activations_of(stats) else None
    return None


def check_quantized(folder: Path) -> None:
    """Raise where the quantized model in ``folder`` was made from another plan than lies beside it."""
    home = folder.parent
    renew = f"{renewing(Stage.QUANTIZE, home, f'plan={home}')} renews it"
    if changed_files(home, (MODEL_CONFIG,)):
        raise CalibError(f"{folder}: was changed after the job that made it; {renew}")
    if not (home / PLAN).exists():
        return
    plan, found = read_layers(home / PLAN), describe(folder)
    if found.plan is None:  # of calib 0.2.0 and earlier: as far as known
        agree = all(plan[name].weight_bits == bits for name, bits in found.bits.items() if name in plan)
    else:
        agree = found.plan == applied_hash(plan, read_steps(home / STEPS))
    if not agree:
        raise CalibError(f"{folder}: was made from another plan than {PLAN} and {STEPS} beside it; {renew}")


def check_directory(settings: Settings, home: Path) -> None:
    """Raise where ``home``, in which the job is to run, holds products that are not those that the job starts from.

    Results beside them would pass for results of theirs.
    """
    pairs: list[tuple[str, Path]] = []
    if settings.stage is Stage.ANALYZE:
        stats = stats_of(settings)
        source = stats if stats.is_dir() else stats.parent
        name = STATISTICS if (home / STATISTICS).exists() else ACTIVATIONS
        pairs = [(name, source / name)]
    elif settings.stage is Stage.QUANTIZE:
        source = plan_of(settings).parent
        if any((home / name).exists() for name in (ACTIVATIONS, SUMMARY)):
            pairs = [(PLAN, plan_of(settings))]
    elif settings.stage is Stage.GENERATE:
        later = [name for stage in ("collect", "analyze", "quantize", "evaluate") for name in PRODUCTS[stage]]
        if held := [name for name in later if (home / name).exists()]:
            allowed = f"holds {held[0]}, and calib generate makes nothing there; name another directory"
            raise ConfigError.bad_value("hydra.run.dir", home, allowed)
    elif settings.stage is Stage.EVALUATE:
        source = quantized_of(settings).parent
        pairs = [(name, source / name) for name in (MODEL_CONFIG, PLAN)]
    for name, file in pairs:
        own = home / name
        if own.exists() and not source.samefile(home) and not (file.exists() and content_of(own) == content_of(file)):
            raise ConfigError(f"hydra.run.dir={home}: holds another {name} than {file}; name another directory")


def quantized_of(settings: Settings) -> Path:
    """The folder of the quantized model in the run directory given by ``plan=``; raises where there is none."""
    given = settings.quantize.plan
    if given is None:
        raise ConfigError("plan is not set: name the run directory of calib quantize, calib evaluate plan=DIR")
    given = home_of(given)
    settle(given)
    folder = given / MODEL
    if not (folder / CHECKPOINT).is_file():
        make = f"{renewing(Stage.QUANTIZE, given, f'plan={given}')} makes one"
        raise ConfigError(f"plan={given}: no quantized model there; {make}")
    return folder
