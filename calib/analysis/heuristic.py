"""Call a heuristic by its signature: one that plans each layer by itself, or one that plans all layers at once.

A parameter ``layer`` gets the statistics of one layer at a time, ``layers`` those of all layers by name. With
``sensitivities`` beside ``layers`` it also gets the measured errors of quantizing each layer alone; they are measured
only then.
"""

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

from calib.analysis.layers import PROBE, LayerSummary
from calib.analysis.plan import LayerPlan, Plan, fault_of
from calib.analysis.sensitivities import Sensitivities
from calib.base.errors import ConfigError
from calib.base.progress import note

import numpy as np

#: Errors that a correct heuristic may raise on made-up statistics, which are all alike and of few steps.
NOT_CONCLUSIVE = (ArithmeticError, LookupError, ValueError)

#: A heuristic over one layer at a time, its parameters bound.
LayerHeuristic: TypeAlias = Callable[[LayerSummary], LayerPlan]


@dataclass(frozen=True)
class Heuristic:
    """An option of the config group ``analysis``, its parameters bound.

    Attributes:
        GIVEN: names of the parameters that calib supplies, where the function has them.
        function: returns a LayerPlan where it takes ``layer``, else a Plan.
        by_layer: whether it takes ``layer``.
        measures: whether it takes ``sensitivities``, which need a model and stored states.
        named: the option, for errors.
    """

    GIVEN: ClassVar = ("layer", "layers", "sensitivities")

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
            with found.on_trial():
                found.check("a made-up layer", function(layer=PROBE))
        return found

    @contextmanager
    def on_trial(self) -> Iterator[None]:
        """Try the heuristic on made-up statistics: errors that real ones may not cause become a note."""
        try:
            yield
        except NOT_CONCLUSIVE as error:
            raised = f"{type(error).__name__}: {error}"
            note(f"{self.named}: raised {raised} on made-up statistics; if it does so on real ones, the job ends there")

    def plan(self, layers: Mapping[str, LayerSummary], sensitivities: Callable[[], Sensitivities]) -> Plan:
        """The plan for ``layers``, with the outliers in their statistics."""
        if self.by_layer:
            plan = Plan({name: self.check(name, self.function(layer=layer)) for name, layer in layers.items()})
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
        plan = self.function(layers=layers, **more)
        if not isinstance(plan, Plan):
            must = "a heuristic that takes layers must return a Plan"
            raise ConfigError(f"{self.named}: returned {type(plan).__name__}; {must}")
        if missing := sorted(set(layers) ^ set(plan.layers)):
            raise ConfigError(f"{self.named}: must plan every layer once, and no other; look at {missing[0]}")
        return replace(plan, layers={name: self.check(name, plan.layers[name]) for name in layers})

    def check(self, layer: str, plan: Any) -> LayerPlan:
        """Check the plan of one layer, and replace NumPy's integers by Python's.

        Raises:
            ConfigError: it is no LayerPlan, or holds what MLX cannot run.
        """
        if not isinstance(plan, LayerPlan):
            must = "a heuristic must return a LayerPlan for each layer"
            raise ConfigError(f"{self.named}: returned {type(plan).__name__} for {layer}; {must}")
        try:
            found = replace(
                plan,
                weight_bits=operator.index(plan.weight_bits),
                activation_bits=operator.index(plan.activation_bits),
                group_size=operator.index(plan.group_size),
            )
        except TypeError:
            raise ConfigError(f"{self.named}: bits and group_size of {layer} must be integers") from None
        if fault := fault_of(found):
            raise ConfigError(f"{self.named}: {layer} has {fault}")
        return found

    def phase_bits(self, layers: Mapping[str, LayerSummary], plan: Plan) -> dict[str, dict[str, int]]:
        """Activation bits of every layer in each collected phase, by phase.

        A heuristic over single layers gets the statistics of each phase; for others the bits are those of the plan.
        """
        phases = dict.fromkeys(phase for layer in layers.values() for phase in layer.phases)
        if not self.by_layer:
            return {phase: {name: layer.activation_bits for name, layer in plan.layers.items()} for phase in phases}
        return {
            phase: {
                name: self.check(name, self.function(layer=layer.phases[phase])).activation_bits
                for name, layer in layers.items()
            }
            for phase in phases
        }


def check_signature(function: Callable[..., Any], named: str) -> None:
    """Raise where the signature of ``function`` is not that of a heuristic."""
    parameters = inspect.signature(function).parameters
    by_layer, whole = "layer" in parameters, "layers" in parameters
    if by_layer == whole or (by_layer and "sensitivities" in parameters):
        takes = "must take layer, or layers, or layers and sensitivities"
        raise ConfigError(f"{named}: a heuristic {takes}; this one takes {', '.join(parameters) or 'nothing'}")


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
