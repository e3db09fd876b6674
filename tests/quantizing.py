"""What quantizers are given in tests: a layer on any grid, whole transformers; and packed weights read by hand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

from calib.activations.taps import TapPoint, TapSelection, tap_points, tapped
from calib.analysis.plan import LayerPlan
from calib.analysis.ranges import StepRanges
from calib.models.architecture import Architecture, Conditioning, Producer, Site
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.packed import Packed
from calib.quantization.apply import unpacked
from calib.quantization.quantizer import ChannelRange, QuantizerInput

import mlx.core as mx
import numpy as np
from helpers import float64
from mlx import nn
from numpy.typing import NDArray
from tiny_models import tiny_transformer
from watching import keep

Array: TypeAlias = NDArray[np.float64]

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16}


class Modulated:
    """x (1 + scale) + shift, both of an embedding, before a linear layer: an architecture with one place to smooth."""

    def __init__(self, rows: int, columns: int, seed: int = 0):
        random = np.random.RandomState(seed)
        weight = 0.1 * random.randn(rows, columns)
        # Groups of equal weights, of zeros, and of next to nothing: MLX gives them scales that are negative or tiny.
        weight[:5] = np.array([0, 0.25, -0.25, 1e-9, 1e-7])[:, None]
        self.module = nn.Module()
        self.module.modulation, self.module.linear = nn.Linear(32, 2 * columns), nn.Linear(columns, rows)
        self.module.modulation.weight = mx.array(0.1 * random.randn(2 * columns, 32), mx.float32)
        self.module.modulation.bias = mx.array(0.1 * random.randn(2 * columns), mx.float32)
        self.module.linear.weight = mx.array(weight, mx.float32)

    def layers(self) -> dict[str, nn.Module]:
        return {"modulation": self.module.modulation, "linear": self.module.linear}

    def path(self, name: str) -> str:
        return name

    def blocks(self) -> list[str]:
        return []

    def block_of(self, name: str) -> int | None:
        return 0 if name == "linear" else None

    def shared_input(self, name: str) -> str:
        return name

    def kind(self, name: str) -> str:
        return "modulated" if name == "linear" else "embedding"

    def sites(self) -> list[Site]:
        shift, scale = Producer("modulation", 0, 2), Producer("modulation", 1, 2, offset=1.0)
        return [Site(("linear",), (shift, scale))]


@dataclass
class Case:
    """A layer of every grid to be rounded, and what goes into it: whole numbers, whose products float32 sums exactly.

    Attributes:
        clips: the percentiles that were asked for.
        divisors: what each input channel was said to be divided by.
        replaced: the layers that were replaced in each replay.
    """

    bits: int
    group_size: int
    dtype: mx.Dtype
    clips: list[tuple[float, float] | None] = field(default_factory=list)
    divisors: list[Array | None] = field(default_factory=list)
    replaced: list[set[str]] = field(default_factory=list)

    @cached_property
    def architecture(self) -> Modulated:
        return Modulated(rows=12, columns=128 + self.group_size, seed=self.bits)  # more than GPTQ's block of columns

    @cached_property
    def x(self) -> Array:
        """512 correlated inputs of uneven width, one channel always zero."""
        random, columns = np.random.RandomState(self.bits), 128 + self.group_size
        base = random.randint(-4, 5, (512, columns))
        x = (base + np.roll(base, 1, axis=1) - 2 * np.roll(base, 7, axis=1)) * random.randint(1, 5, columns)
        x[:, 5] = 0
        return x.astype(np.float64)

    @property
    def weight(self) -> Array:
        return float64(self.architecture.module.linear.weight)

    def work(self) -> QuantizerInput:
        def replay(points: Sequence[TapPoint], record: Any, pending: Any, replaced: Mapping[str, Packed]) -> None:
            assert [point.name for point in points] == ["linear"]
            self.replaced.append(set(replaced))
            for step, part in enumerate(np.split(self.x, 4)):
                record("linear", mx.array(part.reshape(2, -1, 1, part.shape[1]), mx.float32), [step, step])
                mx.eval(pending())

        def ranges(name: str, clip: tuple[float, float] | None, divisors: Array | None) -> StepRanges:
            self.clips.append(clip)
            self.divisors.append(divisors)
            return StepRanges((0,), (-1.0,), (1.0,))

        return QuantizerInput(
            architecture=self.architecture,
            layers={"linear": self.architecture.module.linear},
            plan={"linear": LayerPlan(self.bits, 8, group_size=self.group_size)},
            dtype=self.dtype,
            replay=replay,
            batches=lambda: iter(()),
            channel_range=lambda _: ChannelRange(self.x.min(axis=0), self.x.max(axis=0)),
            ranges=ranges,
        )


def integers_of(packed: Packed) -> NDArray[np.int64]:
    """q, (rows, columns)."""
    ones, zeros = mx.ones_like(packed.scales), mx.zeros_like(packed.biases)
    return np.array(replace(packed, scales=ones, biases=zeros, rotation=0).dequantize()).astype(np.int64)


def values_of(packed: Packed) -> Array:
    """scale · q + bias of the stored numbers, in float64."""
    scales, biases = (np.repeat(float64(x), packed.group_size, axis=1) for x in (packed.scales, packed.biases))
    return scales * integers_of(packed) + biases


def same(one: Packed, two: Packed) -> bool:
    pairs = ((one.weight, two.weight), (one.scales, two.scales), (one.biases, two.biases))
    return (one.bits, one.group_size) == (two.bits, two.group_size) and all(mx.array_equal(*pair) for pair in pairs)


@dataclass(frozen=True)
class States:
    """A transformer, and arguments of some forwards of it."""

    architecture: Architecture
    arguments: Sequence[tuple[mx.array, Conditioning, mx.array]]

    def outputs(self, architecture: Architecture | None = None) -> list[NDArray[np.float32]]:
        own = architecture or self.architecture
        return [np.array(own.velocity(*state)) for state in self.arguments]

    def inputs(self, architecture: Architecture | None = None) -> list[dict[str, NDArray[np.float32]]]:
        """What each tap sees in each forward."""
        found, own = [], architecture or self.architecture
        for state in self.arguments:
            seen: dict[str, mx.array] = {}
            with tapped(own, tap_points(own, TapSelection()), keep(seen)):
                own.velocity(*state)
            found.append({name: np.array(x) for name, x in seen.items()})
        return found

    def replay(
        self,
        points: Sequence[TapPoint],
        record: Any,
        pending: Callable[[], Sequence[mx.array]],
        replaced: Mapping[str, Packed],
    ) -> None:
        with unpacked(self.architecture, replaced):
            for step, state in enumerate(self.arguments):

                def seen(name: str, x: mx.array, step: int = step) -> mx.array:
                    found: mx.array = record(name, x, [step] * len(x))
                    return found

                with tapped(self.architecture, points, seen):
                    self.architecture.velocity(*state)
                    mx.eval(pending())

    @contextmanager
    def given(self, replaced: Mapping[str, mx.array]) -> Iterator[None]:
        """Within the context layers have other weights."""
        layers = self.architecture.layers()
        own = {name: layers[name].weight for name in replaced}
        try:
            for name, weight in replaced.items():
                layers[name].weight = weight
            yield
        finally:
            for name, weight in own.items():
                layers[name].weight = weight

    @cached_property
    def extremes(self) -> dict[str, ChannelRange]:
        """What statistics would say of every layer's channels."""
        found, inputs = {}, self.inputs()
        for point in tap_points(self.architecture, TapSelection()):
            seen = [x[point.name].reshape(-1, x[point.name].shape[-1]).astype(np.float64) for x in inputs]
            low, high = np.concatenate(seen).min(axis=0), np.concatenate(seen).max(axis=0)
            found.update(dict.fromkeys(point.names, ChannelRange(low, high)))
        return found


@dataclass
class Asked:
    """Answers of the statistics, and what they were asked: clipping and divisors by layer."""

    states: States
    asked: dict[str, tuple[tuple[float, float] | None, Array | None]] = field(default_factory=dict)

    def ranges(self, name: str, clip: tuple[float, float] | None, divisors: Array | None) -> StepRanges:
        self.asked[name] = (clip, divisors)
        return StepRanges((0,), (-float(len(name)),), (1.0,))

    @property
    def divisors(self) -> dict[str, Array]:
        return {name: s for name, (_, s) in self.asked.items() if s is not None}


def work_on(states: States, bits: int = 4, group_size: int = 64, asked: Asked | None = None) -> QuantizerInput:
    """Every linear layer whose width fits, with one plan for all."""
    layers = states.architecture.layers()
    fitting = {n: l for n, l in layers.items() if isinstance(l, nn.Linear) and l.weight.shape[1] % group_size == 0}
    return QuantizerInput(
        architecture=states.architecture,
        layers=fitting,
        plan=dict.fromkeys(layers, LayerPlan(bits, 8, group_size=group_size)),
        dtype=mx.float16,
        replay=states.replay,
        batches=lambda: iter(()),
        channel_range=states.extremes.__getitem__,
        ranges=(asked or Asked(states)).ranges,
    )


def tiny_states(structure: str) -> States:
    """Noise and random text, in batches of one row and of two: DiffusionKit modulates one by a kernel, more not."""
    random = np.random.RandomState(0)
    states = []
    for rows in (1, 2):
        for timestep in (750.0, 250.0):
            shapes = ((rows, 8, 6, 16), (rows, 5, 64), (rows, 32))
            x, tokens, pooled = (mx.array(random.randn(*shape).astype(np.float32)) for shape in shapes)
            states.append((x, Conditioning(tokens, pooled), mx.array(timestep)))
    mx.eval([timestep for *_, timestep in states])
    transformer = tiny_transformer(structure, spread=1.0, text=64, pooled=32)
    return States(MMDiTArchitecture(transformer), states)
