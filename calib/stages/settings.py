"""Typed settings of each stage: the configuration's top-level keys, nested by the stage that reads them.

A field is the top-level key of its name, checked against its annotation; a dataclass is a key with nested keys. The
value of a field marked MADE is made from its key by :mod:`calib.stages.build`; a field marked DERIVED is no key.
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
from calib.analysis.ranges import RangeRule
from calib.analysis.sensitivities import Of
from calib.base.affine import GROUP_SIZES
from calib.base.values import AtLeast, AtMost
from calib.dataset import subsets, timesteps
from calib.dataset.settings import SamplerSettings
from calib.dataset.shards import Shard
from calib.dataset.store import StateDtype, StorageFormat
from calib.evaluation.measures import DEFAULT
from calib.models.architecture import Architecture
from calib.models.model import DiffusionModel
from calib.quantization.quantizer import Quantizer
from calib.stages import Stage

#: Chooses among image ids for collection; a choice by final latents needs the second argument.
ImageChooser: TypeAlias = Callable[[Sequence[int], "subsets.Latents | None"], list[int]]


#: Marks of fields; see above.
MADE, DERIVED = "made", "derived"


class KeptStates(StrEnum):
    """Selection of the states that a dataset keeps: all, or those of the timestep schedule."""

    ALL = "all"
    SCHEDULE = "schedule"


@dataclass(frozen=True)
class DatasetSettings:
    """Storage of trajectories."""

    format: StorageFormat = StorageFormat.HDF5
    dtype: StateDtype = StateDtype.FLOAT16
    steps: KeptStates = KeptStates.ALL


@dataclass(frozen=True)
class StorageSettings:
    """Storage of statistics and activations; see :class:`CollectSettings` and :class:`SampleSettings`."""

    histogram_rows: Annotated[int | None, AtLeast(1)] = 256
    samples: Samples = Samples.NONE
    rows_per_image: Annotated[int, AtLeast(1)] = 2
    dtype: StateDtype | None = None


class Method(StrEnum):
    """How sensitivities are measured: one backward pass for all options, or a forward pass for each."""

    GRADIENT = "gradient"
    TRIALS = "trials"


@dataclass(frozen=True)
class SensitivitySettings:
    """What sensitivities are of, how and on how many collected images they are measured, and group sizes to try.

    Attributes:
        steps: number of collected steps of an output; of a picture all steps of the trajectory are used.
        probes: random directions of a gradient for each image.
    """

    method: Method = Method.GRADIENT
    of: Of = Of.PICTURE
    images: Annotated[int, AtLeast(1)] = 4
    steps: Annotated[int, AtLeast(1)] = 8
    probes: Annotated[int, AtLeast(1)] = 1
    group_sizes: Sequence[int] = GROUP_SIZES


@dataclass(frozen=True)
class CalibrationSettings:
    """Numbers of collected images and steps in the calibration set that quantizers replay."""

    images: Annotated[int, AtLeast(1)] = 128
    steps: Annotated[int, AtLeast(1)] = 8


@dataclass(frozen=True)
class EvaluationSettings:
    """Images to draw at full precision and quantized; no evaluation where ``num_images`` is 0.

    Attributes:
        steps: number of steps at which outputs are compared.
        metrics: measures by name; those of :data:`calib.evaluation.measures.DEFAULT` are always there.
        reference: a folder of pictures that measures of sets compare with; None: those of the full-precision model.
        clip: the CLIP of those measures that need one: a folder, or a repository of the hub.
        inception: a file of weights in torch-fidelity's layout; None: those that it downloads.
        by: a column of the file of prompts, for scores by what is in it.
        dequantize: run dense layers with the dequantized weights; None: everywhere but on Metal.
    """

    num_images: Annotated[int, AtLeast(0), AtMost(1_000_000)] = 10
    seed: Annotated[int, AtLeast(0)] = 0
    steps: Annotated[int, AtLeast(1)] = 10
    metrics: Sequence[str] = DEFAULT
    reference: Path | None = None
    clip: str | None = None
    inception: Path | None = None
    by: str | None = None
    dequantize: bool | None = None

    @property
    def base_seed(self) -> int:
        """A base seed whose images differ from all calibration images.

        SeedSequence splits numbers into words of 32 bits, so (this number, image) equals (seed, image) for no image.
        """
        return (0xE7A1_0000 << 32) + self.seed


class ReportForm(StrEnum):
    """Form of a run's report besides its files: an HTML page, or none."""

    HTML = "html"
    NONE = "none"


@dataclass(frozen=True)
class ModelChoice:
    """The chosen model: its name, its loader, and a builder of its transformer without weights, where it has one.

    Attributes:
        is_streamed: whether it is known that its weights will be streamed from the checkpoint.
    """

    name: str
    load: Callable[[], DiffusionModel]
    skeleton: Callable[[], Architecture] | None
    is_streamed: Callable[[], bool] = lambda: False

    def architecture(self, load: Callable[[], DiffusionModel]) -> Architecture:
        """The transformer without weights, or that of the model that ``load`` returns where there is no skeleton."""
        return load().architecture if self.skeleton is None else self.skeleton()


@dataclass(frozen=True)
class Job:
    """Keys of every stage."""

    stage: Stage
    swept: Sequence[str]  # for Hydra, which names folders by it
    model: Annotated[ModelChoice, MADE]
    shard: Annotated[Shard, MADE]
    cache_dir: Annotated[Path, MADE]
    keep_awake: bool
    report: ReportForm


@dataclass(frozen=True)
class Generate:
    """Keys of the stage that draws a dataset.

    Attributes:
        data_dir: the configured folder, or a default named by what determines the images.
        given_data_dir: the configured folder, if any.
        kept_steps: the states that a dataset of this configuration keeps.
    """

    num_images: Annotated[int, AtLeast(1), AtMost(10_000_000)]
    seed: Annotated[int, AtLeast(0)]
    prompts: Annotated[tuple[str, ...], MADE]
    sampler: Annotated[SamplerSettings, MADE]
    dataset: DatasetSettings
    data_dir: Annotated[Path, MADE]
    given_data_dir: Annotated[Path | None, DERIVED]
    kept_steps: Annotated[tuple[int, ...], DERIVED]


@dataclass(frozen=True)
class Collect:
    """Keys of the stage that observes activations.

    Attributes:
        timestep_schedule: the steps to collect, or the rule by which statistics choose them.
        subset: chooses the images to collect.
        collect: settings from the keys ``collect``, ``storage`` and ``taps.cfg_halves``.
        generate_missing: whether missing images are drawn first.
    """

    timestep_schedule: Annotated[tuple[int, ...] | timesteps.DriftSchedule, MADE]
    subset: Annotated[ImageChooser, MADE]
    taps: TapSelection
    storage: StorageSettings
    collect: Annotated[CollectSettings, MADE]
    generate_missing: Annotated[bool, MADE]


@dataclass(frozen=True)
class Analyze:
    """Keys of the stage that makes a plan from statistics."""

    stats: Path | None
    analysis: Annotated[Heuristic, MADE]
    ranges: Annotated[RangeRule, MADE]
    phase_bits: bool
    sensitivity: SensitivitySettings
    export_config: Path | None


@dataclass(frozen=True)
class Quantize:
    """Keys of the stage that applies a plan."""

    plan: Path | None
    quantizer: Annotated[Quantizer, MADE]
    calibration: CalibrationSettings


@dataclass(frozen=True)
class Evaluate:
    """Keys of the stage that measures fidelity.

    Attributes:
        data_dir: the folder of the full-precision pictures.
        categories: for each prompt of the list what ``evaluation.by`` has for it; None where that is not set.
    """

    evaluation: Annotated[EvaluationSettings, MADE]
    data_dir: Annotated[Path, DERIVED]
    categories: Annotated[tuple[str, ...] | None, DERIVED]


@dataclass(frozen=True)
class Settings:
    """All settings of a job, checked; callables have their configured parameters bound.

    Attributes:
        fingerprint: hash of everything in the configuration that results depend on.
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
        """The stage of the job."""
        return self.job.stage
