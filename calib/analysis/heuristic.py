"""A heuristic as the stages see it: one that looks at each layer by itself, or one that decides about all at once.

What it takes says which it is: a parameter ``layer`` gets one layer's statistics at a time, ``layers`` those of all by
name, and ``sensitivities``, beside it, what quantizing each alone does to the model; they are measured only then.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

from calib.analysis.layers import PROBE, LayerSummary
from calib.analysis.plan import LayerPlan, Plan
from calib.analysis.sensitivities import Sensitivities
from calib.base.errors import ConfigError

import numpy as np

#: A heuristic that looks at one layer at a time, its parameters bound.
LayerHeuristic: TypeAlias = Callable[[LayerSummary], LayerPlan]


@dataclass(frozen=True)
class Heuristic:
    """An option of the config group ``analysis``, its parameters bound.

    Attributes:
        GIVEN: the parameters that are supplied to it, of those it has.
        function: returns a LayerPlan where it is given ``layer``, else a Plan.
        measures: whether it needs sensitivities, which take a model and stored states.
    """

    GIVEN: ClassVar = ("layer", "layers", "sensitivities")

    function: Callable[..., Any]
    by_layer: bool
    measures: bool

    @classmethod
    def of(cls, function: Callable[..., Any], named: str) -> "Heuristic":
        """The heuristic that ``function`` is by its signature; ``named`` says which option it is, for errors.

        Raises:
            ConfigError: it takes neither ``layer`` nor ``layers``, or, tried on one layer, returns no LayerPlan.
        """
        parameters = inspect.signature(function).parameters
        by_layer, whole = "layer" in parameters, "layers" in parameters
        if by_layer == whole or (by_layer and "sensitivities" in parameters):
            takes = "must take layer, or layers, or layers and sensitivities"
            raise ConfigError(f"{named}: a heuristic {takes}; this one takes {', '.join(parameters) or 'nothing'}")
        found = cls(function, by_layer, "sensitivities" in parameters)
        if by_layer and not isinstance(function(layer=PROBE), LayerPlan):
            raise ConfigError(f"{named}: a heuristic that takes layer must return a LayerPlan")
        return found

    def plan(self, layers: Mapping[str, LayerSummary], sensitivities: Callable[[], Sensitivities]) -> Plan:
        """The plan for ``layers``, with the outliers that the statistics show."""
        if self.by_layer:
            return make_plan(layers, lambda layer: self.function(layer=layer))
        return with_outliers(self.whole(layers, sensitivities), layers)

    def whole(self, layers: Mapping[str, LayerSummary], sensitivities: Callable[[], Sensitivities]) -> Plan:
        """What a heuristic over all layers returns for ``layers``.

        Raises:
            ConfigError: it is no Plan, or one of other layers.
        """
        more = {"sensitivities": sensitivities()} if self.measures else {}
        plan = self.function(layers=layers, **more)
        function = getattr(self.function, "func", self.function)
        named = f"analysis: {getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
        if not isinstance(plan, Plan):
            raise ConfigError(
                f"{named} returned {type(plan).__name__}; a heuristic that takes layers must return a Plan"
            )
        if missing := sorted(set(layers) ^ set(plan.layers)):
            raise ConfigError(f"{named} must plan every layer once, and no other; look at {missing[0]}")
        return plan

    def phase_bits(self, layers: Mapping[str, LayerSummary], plan: Plan) -> dict[str, dict[str, int]]:
        """Activation bits of every layer in each phase that was collected.

        A heuristic that looks at single layers looks at those phase's statistics alone; of another they are the plan's.
        """
        phases = dict.fromkeys(phase for layer in layers.values() for phase in layer.phases)
        if not self.by_layer:
            return {phase: {name: layer.activation_bits for name, layer in plan.layers.items()} for phase in phases}
        return {
            phase: {name: self.function(layer=layer.phases[phase]).activation_bits for name, layer in layers.items()}
            for phase in phases
        }


def make_plan(layers: Mapping[str, LayerSummary], heuristic: LayerHeuristic) -> Plan:
    """Apply ``heuristic`` to every layer and name the outliers."""
    return with_outliers(Plan({name: heuristic(layer) for name, layer in layers.items()}), layers)


def with_outliers(plan: Plan, layers: Mapping[str, LayerSummary]) -> Plan:
    """``plan`` with the outliers that the statistics show."""
    channels = {name: found for name, layer in layers.items() if (found := outlier_channels(layer))}
    return replace(plan, outlier_layers=outlier_layers(layers), outlier_channels=channels)


def outlier_channels(layer: LayerSummary, factor: float = 2.5) -> dict[int, float]:
    """Channels whose range exceeds ``factor`` times the layer's median channel range (this project's origin).

    Each with its range in medians.
    """
    if layer.channel_range is None or not len(layer.channel_range):
        return {}
    median = float(np.median(layer.channel_range))
    if not median > 0:
        return {}
    chosen = np.flatnonzero(layer.channel_range > factor * median)
    return {int(i): float(layer.channel_range[i] / median) for i in chosen}


def outlier_layers(layers: Mapping[str, LayerSummary], threshold: float = 50.0) -> dict[str, float]:
    """Layers with heavy tails: kurtosis of the pooled histogram above ``threshold`` (a normal distribution has 3)."""
    return {
        name: layer.kurtosis
        for name, layer in layers.items()
        if layer.kurtosis is not None and layer.kurtosis > threshold
    }
