"""Call a heuristic by its signature: one that plans each layer by itself, or one that plans all layers at once.

A parameter ``layer`` gets the statistics of one layer at a time, ``layers`` those of all layers by name. With
``sensitivities`` beside ``layers`` it also gets the measured errors of quantizing each layer alone; they are measured
only then.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from calib.analysis.layers import PROBE, LayerSummary
from calib.analysis.plan import LayerPlan, Plan, fault_of
from calib.analysis.sensitivities import Sensitivities
from calib.base.affine import WEIGHT_BITS
from calib.base.errors import ConfigError
from calib.base.option import Option, Unfit, in_short, innermost, kind_of, on_trial, said, several, whole_number
from calib.base.targets import check_returns
from calib.dataset.timesteps import phase_bounds

import numpy as np

#: Names of the parameters that calib supplies, where a heuristic has them.
GIVEN = ("layer", "layers", "sensitivities")

#: A heuristic over one layer at a time, its parameters bound.
LayerHeuristic: TypeAlias = Callable[[LayerSummary], LayerPlan]


@dataclass(frozen=True)
class Heuristic:
    """An option of the config group ``analysis``, its parameters bound.

    Attributes:
        function: returns a LayerPlan where it takes ``layer``, else a Plan.
        by_layer: whether it takes ``layer``.
        measures: whether it takes ``sensitivities``, which need a model and stored states.
        named: the option, for errors.
    """

    function: Callable[..., Any]
    by_layer: bool
    measures: bool
    named: str

    @classmethod
    def of(cls, function: Callable[..., Any], named: str) -> "Heuristic":
        """Build a heuristic from ``function`` by its signature; ``named`` names the option, for errors.

        Raises:
            ConfigError: it has another signature, or, tried on one layer, returns no LayerPlan.
        """
        check_signature(function, named)
        given = inspect.signature(function).parameters
        found = cls(function, "layer" in given, "sensitivities" in given, named)
        if found.by_layer:
            with on_trial():
                found.layer_plan("a made-up layer", PROBE)
        return found

    def layer_plan(self, name: str, layer: LayerSummary) -> LayerPlan:
        """The plan of one layer, of a heuristic over single layers.

        Raises:
            ConfigError: it is no LayerPlan, or holds what MLX cannot run.
        """
        must = "a LayerPlan for each layer"
        return Option(self.named, self.function, ("layer",), must, partial(_layer_plan, name=name))(layer)

    def plan(self, layers: Mapping[str, LayerSummary], sensitivities: Callable[[], Sensitivities]) -> Plan:
        """The plan for ``layers``, with the outliers in their statistics."""
        if self.by_layer:
            plan = Plan({name: self.layer_plan(name, layer) for name, layer in layers.items()})
        else:
            plan = self.whole(layers, sensitivities)
        return with_outliers(plan, layers)

    def whole(
        self, layers: Mapping[str, LayerSummary], sensitivities: Callable[[], Sensitivities] | None = None
    ) -> Plan:
        """The plan of a heuristic over all layers; ``sensitivities`` is called if it measures.

        Raises:
            ConfigError: it is no Plan, or one of other layers.
        """
        more = {}
        if self.measures:
            assert sensitivities is not None
            more["sensitivities"] = sensitivities()
        return Option(self.named, self.function, GIVEN, "a Plan of every layer", _plan)(layers=layers, **more)

    def phase_bits(self, layers: Mapping[str, LayerSummary], plan: Plan) -> dict[str, dict[str, int]]:
        """Activation bits of every layer in each collected phase, by phase.

        A heuristic over single layers gets the statistics of each phase; for others the bits are those of the plan.
        """
        phases = dict.fromkeys(phase for layer in layers.values() for phase in layer.phases)
        if not self.by_layer:
            return {phase: {name: layer.activation_bits for name, layer in plan.layers.items()} for phase in phases}
        return {
            phase: {name: self.layer_plan(name, layer.phases[phase]).activation_bits for name, layer in layers.items()}
            for phase in phases
        }


def check_signature(function: Callable[..., Any], named: str) -> None:
    """Raise where the signature of ``function`` is not that of a heuristic, nor what it says that it returns."""
    parameters = inspect.signature(function).parameters
    by_layer, whole = "layer" in parameters, "layers" in parameters
    if by_layer == whole or (by_layer and "sensitivities" in parameters):
        takes = "must take layer, or layers, or layers and sensitivities"
        raise ConfigError(f"{named}: a heuristic {takes}; this one takes {', '.join(parameters) or 'nothing'}")
    check_returns(named, innermost(function), (LayerPlan,) if by_layer else (Plan, Mapping, list, tuple))


# What a heuristic returned, with NumPy's values as Python's, so that a file can hold them


def _layer_plan(found: Any, name: str, **_: Any) -> LayerPlan:
    if not isinstance(found, LayerPlan):
        raise Unfit(f"returned {kind_of(found)} for {name}")
    whole = {key: getattr(found, key) for key in ("weight_bits", "activation_bits", "group_size", "nbytes")}
    try:
        low, high = map(float, found.clip_percentile)
        sensitivity = None if found.sensitivity is None else float(found.sensitivity)
        sensitive, aggressive = bool(found.sensitive), bool(found.aggressive)
    except (TypeError, ValueError) as error:
        raise Unfit(f"{name} has {in_short(found)} ({said(error)})") from None
    plan = replace(
        found,
        **{key: whole_number(value, f"{name} has {key}=") for key, value in whole.items() if value is not None},
        clip_percentile=(low, high),
        sensitivity=sensitivity,
        sensitive=sensitive,
        aggressive=aggressive,
        reason=str(found.reason),
        figure=str(found.figure),
    )
    if fault := fault_of(plan):
        raise Unfit(f"{name} has {fault}")
    if sensitivity is not None and not math.isfinite(sensitivity):
        raise Unfit(f"{name} has sensitivity={sensitivity}")
    return plan


def _plan(found: Any, layers: Mapping[str, LayerSummary], **_: Any) -> Plan:
    """A Plan, from one, from layer plans by name, or from as many as there are layers, in their order."""
    if isinstance(found, Mapping):
        found = Plan(dict(found))
    elif isinstance(found, list | tuple) and len(found) == len(layers):
        found = Plan(dict(zip(layers, found, strict=True)))
    if not isinstance(found, Plan):
        count = f" of {len(found)}" if isinstance(found, list | tuple) else ""
        raise Unfit(f"returned {kind_of(found)}{count}")
    if strange := [name for name in found.layers if name not in layers]:
        raise Unfit(f"it has {in_short(strange[0])}, which is no layer")
    if lacking := [name for name in layers if name not in found.layers]:
        raise Unfit(f"it lacks {lacking[0]}")
    return replace(
        found,
        layers={name: _layer_plan(found.layers[name], name) for name in layers},
        phase_weight_bits={phase: _bits(phase, own, layers) for phase, own in found.phase_weight_bits.items()},
        step_activation_bits=_step_bits(found.step_activation_bits, layers),
        notes=(found.notes,) if isinstance(found.notes, str) else tuple(map(str, several(found.notes))),
    )


def _bits(phase: str, found: Mapping[str, Any], layers: Mapping[str, LayerSummary]) -> dict[str, int]:
    """Weight bits by layer in one phase."""
    bits = {name: whole_number(value, f"{name} has weight bits ") for name, value in found.items()}
    if phase not in phase_bounds(1) or not bits.keys() <= layers.keys() or not set(bits.values()) <= set(WEIGHT_BITS):
        raise Unfit(f"its phase_weight_bits has {in_short({phase: dict(found)})}")
    return bits


def _step_bits(found: Mapping[str, Any], layers: Mapping[str, LayerSummary]) -> dict[str, tuple[int, ...]]:
    """Activation bits at every step by layer."""
    what = "its step_activation_bits has "
    bits = {name: tuple(whole_number(b, f"{what}{name} at ") for b in several(own)) for name, own in found.items()}
    if strange := [name for name, own in bits.items() if name not in layers or not set(own) <= set(range(2, 17))]:
        raise Unfit(f"{what}{in_short({strange[0]: found[strange[0]]})}")
    return bits


def make_plan(layers: Mapping[str, LayerSummary], heuristic: LayerHeuristic) -> Plan:
    """Apply ``heuristic`` to every layer, and add the outliers."""
    return with_outliers(Plan({name: heuristic(layer) for name, layer in layers.items()}), layers)


def with_outliers(plan: Plan, layers: Mapping[str, LayerSummary]) -> Plan:
    """``plan`` with the outlier layers and channels in the statistics."""
    channels = {name: found for name, layer in layers.items() if (found := outlier_channels(layer))}
    return replace(plan, outlier_layers=outlier_layers(layers), outlier_channels=channels)


def outlier_channels(layer: LayerSummary, factor: float = 2.5) -> dict[int, float]:
    """Channels whose range exceeds ``factor`` times the layer's median channel range, each with its ratio.

    The rule of the scripts that calib started from.
    """
    if layer.channel_range is None or not len(layer.channel_range):
        return {}
    median = float(np.median(layer.channel_range))
    if not median > 0:
        return {}
    chosen = np.flatnonzero(layer.channel_range > factor * median)
    return {int(i): float(layer.channel_range[i] / median) for i in chosen}


def outlier_layers(layers: Mapping[str, LayerSummary], threshold: float = 50.0) -> dict[str, float]:
    """Layers with heavy tails: kurtosis of the pooled histogram above ``threshold`` (3 for a normal distribution)."""
    return {
        name: layer.kurtosis
        for name, layer in layers.items()
        if layer.kurtosis is not None and layer.kurtosis > threshold
    }
