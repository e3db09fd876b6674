"""What a stage needs, checked and typed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias

from calib import subsets, timesteps
from calib.activations.samples import Samples
from calib.activations.step import CollectSettings
from calib.activations.taps import TapSelection
from calib.analysis.heuristic import Heuristic
from calib.analysis.plan import GROUP_SIZES
from calib.analysis.ranges import RangeRule
from calib.dataset.settings import SamplerSettings
from calib.dataset.shards import Shard
from calib.dataset.store import StateDtype, StorageFormat
from calib.models.model import DiffusionModel
from calib.quantization.quantizer import Quantizer

from diffusionkit.mlx.mmdit import MMDiT

#: Which of the image ids given are collected; where the final latents decide, they must be given too.
ImageChooser: TypeAlias = Callable[[Sequence[int], "subsets.Latents | None"], list[int]]


class Stage(StrEnum):
    """What a job does."""

    RUN = "run"
    GENERATE = "generate"
    COLLECT = "collect"
    ANALYZE = "analyze"
    QUANTIZE = "quantize"
    EVALUATE = "evaluate"


class StoredStates(StrEnum):
    """Which states of a trajectory are stored: all, or only those of the timestep schedule."""

    ALL = "all"
    SCHEDULE = "schedule"


@dataclass(frozen=True)
class DatasetSettings:
    """How trajectories are stored."""

    format: StorageFormat = StorageFormat.HDF5
    dtype: StateDtype = StateDtype.FLOAT16
    steps: StoredStates = StoredStates.ALL


@dataclass(frozen=True)
class StorageSettings:
    """What is kept of activations; see :class:`CollectSettings` and :class:`SampleSettings`."""

    histogram_rows: int | None = 256
    samples: Samples = Samples.NONE
    rows_per_image: int = 2
    dtype: StateDtype | None = None


@dataclass(frozen=True)
class SensitivitySettings:
    """What sensitivities are measured on: so many of the images and of the steps that were collected."""

    images: int = 4
    steps: int = 8
    group_sizes: Sequence[int] = GROUP_SIZES


@dataclass(frozen=True)
class CalibrationSettings:
    """The stored states that quantizers replay: so many of the images and of the steps that were collected."""

    images: int = 32
    steps: int = 8


@dataclass(frozen=True)
class EvaluationSettings:
    """What is drawn at full precision and quantized; nothing where ``num_images`` is 0.

    ``dequantize``: run dense layers with the dequantized weights; None: everywhere but on Metal.
    """

    num_images: int = 10
    seed: int = 0
    steps: int = 10
    dequantize: bool | None = None

    @property
    def base_seed(self) -> int:
        """Beyond all that calibration images are drawn with.

        SeedSequence sees words of 32 bits: (seed, this number, image) is (seed, image) of no image there can be.
        """
        return (0xE7A1_0000 << 32) + self.seed


@dataclass(frozen=True)
class Settings:
    """Everything a stage needs, checked. Callables have their configured parameters bound."""

    stage: Stage
    model_name: str
    load_model: Callable[[], DiffusionModel]
    skeleton: Callable[[], MMDiT] | None
    prompts: tuple[str, ...]
    num_images: int
    seed: int
    data_dir: Path
    cache_dir: Path
    sampler: SamplerSettings
    dataset: DatasetSettings
    steps: tuple[int, ...] | timesteps.Drift
    choose_images: ImageChooser
    taps: TapSelection
    collect: CollectSettings
    heuristic: Heuristic
    ranges: RangeRule
    phase_bits: bool
    sensitivity: SensitivitySettings
    quantizer: Quantizer
    calibration: CalibrationSettings
    evaluation: EvaluationSettings
    evaluation_dir: Path
    generate_missing: bool
    shard: Shard
    keep_awake: bool
    stats: Path | None
    plan: Path | None
    export_config: Path | None
    given_data_dir: Path | None
    fingerprint: str

    @property
    def stored_steps(self) -> tuple[int, ...]:
        """The states that a dataset of this configuration keeps."""
        if self.dataset.steps is StoredStates.SCHEDULE and not isinstance(self.steps, timesteps.Drift):
            return self.steps
        return tuple(range(self.sampler.num_steps + 1))
