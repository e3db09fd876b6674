"""A heuristic as the stages see it: one that looks at each layer by itself, or one that decides about all at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from calib.analysis.layers import LayerSummary
from calib.analysis.plan import LayerHeuristic, Plan, make_plan, phase_bits, with_outliers
from calib.analysis.sensitivity import Sensitivities

#: A heuristic that decides about all layers, from statistics and measured sensitivities, its parameters bound.
PlanHeuristic: TypeAlias = Callable[[Mapping[str, LayerSummary], Sensitivities], Plan]


@dataclass(frozen=True)
class Heuristic:
    """Exactly one of the two is given; ``whole`` needs sensitivities, which take a model and stored states."""

    by_layer: LayerHeuristic | None = None
    whole: PlanHeuristic | None = None

    @property
    def measures(self) -> bool:
        return self.whole is not None

    def plan(self, layers: Mapping[str, LayerSummary], sensitivities: Callable[[], Sensitivities]) -> Plan:
        """The plan for ``layers``."""
        if self.by_layer is not None:
            return make_plan(layers, self.by_layer)
        assert self.whole is not None
        return with_outliers(self.whole(layers, sensitivities()), layers)

    def phase_bits(self, layers: Mapping[str, LayerSummary], plan: Plan) -> dict[str, dict[str, int]]:
        """Activation bits of every layer in each phase that was collected."""
        if self.by_layer is not None:
            return phase_bits(layers, self.by_layer)
        phases = dict.fromkeys(phase for layer in layers.values() for phase in layer.phases)
        return {phase: {name: layer.activation_bits for name, layer in plan.layers.items()} for phase in phases}
