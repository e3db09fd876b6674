"""What each stage needs, checked and typed: the configuration's top-level keys, nested by the stage that reads them.

A field is the top-level key of its name, checked against its annotation; a dataclass is a key with keys of its own. The
value of a field marked MADE is made from its key by :mod:`calib.stages.build`; one marked DERIVED is no key at all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeAlias

from calib.activations.samples import Samples
from calib.activations.step import CollectSettings
from calib.activations.taps import TapSelection
from calib.analysis.heuristic import Heuristic
from calib.analysis.plan import GROUP_SIZES
from calib.analysis.ranges import RangeRule
from calib.base.values import AtLeast
from calib.dataset import subsets, timesteps
from calib.dataset.settings import SamplerSettings
from calib.dataset.shards import Shard
from calib.dataset.store import StateDtype, StorageFormat
from calib.models.architecture import Architecture
from calib.models.model import DiffusionModel
from calib.quantization.quantizer import Quantizer
from calib.stages import Stage

#: Which of the image ids given are collected; where the final latents decide, they must be given too.
ImageChooser: TypeAlias = Callable[[Sequence[int], "subsets.Latents | None"], list[int]]


#: Marks of fields; see above.
MADE, DERIVED = "made", "derived"


class KeptStates(StrEnum):
    """Which states of a trajectory a dataset keeps: all, or only those of the timestep schedule."""

    ALL = "all"
    SCHEDULE = "schedule"


@dataclass(frozen=True)
class DatasetSettings:
    """How trajectories are stored."""

    format: StorageFormat = StorageFormat.HDF5
    dtype: StateDtype = StateDtype.FLOAT16
    steps: KeptStates = KeptStates.ALL


@dataclass(frozen=True)
class StorageSettings:
    """What is kept of activations; see :class:`CollectSettings` and :class:`SampleSettings`."""

    histogram_rows: Annotated[int | None, AtLeast(1)] = 256
    samples: Samples = Samples.NONE
    rows_per_image: Annotated[int, AtLeast(1)] = 2
    dtype: StateDtype | None = None


@dataclass(frozen=True)
class SensitivitySettings:
    """What sensitivities are measured on: so many of the images and of the steps that were collected."""

    images: Annotated[int, AtLeast(1)] = 4
    steps: Annotated[int, AtLeast(1)] = 8
    group_sizes: Sequence[int] = GROUP_SIZES


@dataclass(frozen=True)
class CalibrationSettings:
    """The stored states that quantizers replay: so many of the images and of the steps that were collected."""

    images: Annotated[int, AtLeast(1)] = 32
    steps: Annotated[int, AtLeast(1)] = 8


@dataclass(frozen=True)
class EvaluationSettings:
    """What is drawn at full precision and quantized; nothing where ``num_images`` is 0.

    ``dequantize``: run dense layers with the dequantized weights; None: everywhere but on Metal.
    """

    num_images: Annotated[int, AtLeast(0)] = 10
    seed: Annotated[int, AtLeast(0)] = 0
    steps: Annotated[int, AtLeast(1)] = 10
    dequantize: bool | None = None

    @property
    def base_seed(self) -> int:
        """A seed beyond all that calibration images are drawn with.

        SeedSequence sees words of 32 bits: (seed, this number, image) is (seed, image) of no image there can be.
        """
        return (0xE7A1_0000 << 32) + self.seed


class ReportForm(StrEnum):
    """What people get to read of a run besides its files: a page, or nothing."""

    HTML = "html"
    NONE = "none"


@dataclass(frozen=True)
class ModelChoice:
    """The chosen model: its name, what loads it, and what builds it without weights where the option says that."""

    name: str
    load: Callable[[], DiffusionModel]
    skeleton: Callable[[], Architecture] | None

    def architecture(self, load: Callable[[], DiffusionModel]) -> Architecture:
        """The transformer in shape, or with the weights of the model that ``load`` gives where there is no skeleton."""
        return load().architecture if self.skeleton is None else self.skeleton()


@dataclass(frozen=True)
class Job:
    """Keys that concern every stage."""

    stage: Stage
    swept: Sequence[str]
    model: Annotated[ModelChoice, MADE]
    shard: Annotated[Shard, MADE]
    cache_dir: Annotated[Path, MADE]
    keep_awake: bool
    report: ReportForm


@dataclass(frozen=True)
class Generate:
    """Keys of what draws a dataset.

    Attributes:
        data_dir: the folder that is configured, or one named by what makes the images.
        given_data_dir: the folder that is configured, if one is.
        kept_steps: the states that a dataset of this configuration keeps.
    """

    num_images: Annotated[int, AtLeast(1)]
    seed: Annotated[int, AtLeast(0)]
    prompts: Annotated[tuple[str, ...], MADE]
    sampler: Annotated[SamplerSettings, MADE]
    dataset: DatasetSettings
    data_dir: Annotated[Path, MADE]
    given_data_dir: Annotated[Path | None, DERIVED]
    kept_steps: Annotated[tuple[int, ...], DERIVED]


@dataclass(frozen=True)
class Collect:
    """Keys of what observes activations.

    Attributes:
        timestep_schedule: the steps that are collected, or how statistics are to choose them.
        subset: which images are.
        collect: how; the keys of ``collect``, ``storage`` and ``taps.cfg_halves``.
        generate_missing: whether images that are not there are drawn first.
    """

    timestep_schedule: Annotated[tuple[int, ...] | timesteps.DriftSchedule, MADE]
    subset: Annotated[ImageChooser, MADE]
    taps: TapSelection
    storage: StorageSettings
    collect: Annotated[CollectSettings, MADE]
    generate_missing: Annotated[bool, MADE]


@dataclass(frozen=True)
class Analyze:
    """Keys of what turns statistics into a plan."""

    stats: Path | None
    analysis: Annotated[Heuristic, MADE]
    ranges: Annotated[RangeRule, MADE]
    phase_bits: bool
    sensitivity: SensitivitySettings
    export_config: Path | None


@dataclass(frozen=True)
class Quantize:
    """Keys of what applies a plan."""

    plan: Path | None
    quantizer: Annotated[Quantizer, MADE]
    calibration: CalibrationSettings


@dataclass(frozen=True)
class Evaluate:
    """Keys of what says how much was lost; ``data_dir`` is where the full-precision pictures lie."""

    evaluation: Annotated[EvaluationSettings, MADE]
    data_dir: Annotated[Path, DERIVED]


@dataclass(frozen=True)
class Settings:
    """Everything a job needs, checked. Callables have their configured parameters bound.

    Attributes:
        fingerprint: hash of all on which results depend.
    """

    job: Job
    generate: Generate
    collect: Collect
    analyze: Analyze
    quantize: Quantize
    evaluate: Evaluate
    fingerprint: str

    @property
    def stage(self) -> Stage:
        """What the job does."""
        return self.job.stage
