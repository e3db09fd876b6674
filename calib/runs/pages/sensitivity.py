"""Prepares what a run's page shows of sensitivities: of each layer, and of each step."""

from collections.abc import Mapping
from typing import Any

from calib.analysis.plan import LayerPlan
from calib.analysis.sensitivities import Of, Reach
from calib.runs.pages.charts import Curve, Dot, scatter, step_chart
from calib.runs.pages.layers import short_names
from calib.runs.pages.page import trusted
from calib.runs.pages.parts import Part

import numpy as np

#: What a layer's weights do, and the name of the axis.
DOES = {
    Of.PICTURE: ("the picture: its mean squared error", "error of the picture"),
    Of.LATENT: ("the finished latent z: S = ‖Δz‖² / ‖z‖²", "S of the finished latent"),
    Of.OUTPUT: ("the model's output: S = ‖Δv‖² / ‖v‖²", "S, measured"),
}


def of_what(predicted: Mapping[str, Any]) -> Of:
    """Return what errors are of, from what a plan's steps record; calib 0.3.0 recorded pictures alone, and not so."""
    return Of(predicted.get("of", Of.PICTURE if predicted else Of.OUTPUT))


def sensitivity_part(plan: Mapping[str, LayerPlan], predicted: Mapping[str, Any]) -> list[Part]:
    """Return a dot for each layer whose sensitivity was measured."""
    dots, series = sensitivity_dots(plan)
    if not dots:
        return []
    does, axis = DOES[of_what(predicted)]
    note = f"What each layer's weights take as planned, and what they alone do to {does}. Hover a dot for its layer."
    figure = trusted(scatter("sensitivity", dots, ("kB of the layer as planned", axis), series))
    return [Part("sensitivity", "Sensitivity against bytes", note, figure)]


def sensitivity_dots(plan: Mapping[str, LayerPlan]) -> tuple[list[Dot], dict[int, str]]:
    """Return a dot for each layer whose sensitivity was measured, bytes against S, and a series for each bit-width."""
    measured = {
        name: (layer, layer.nbytes, layer.sensitivity)
        for name, layer in plan.items()
        if layer.nbytes and layer.sensitivity and np.isfinite(layer.sensitivity)
    }
    widths = sorted({layer.weight_bits for layer, _, _ in measured.values()})
    series = {bits: number for number, bits in enumerate(widths)}
    dots = [
        Dot(
            label=short,
            x=nbytes / 1000,
            y=s,
            series=series[layer.weight_bits],
            tip=f"{name}: S = {s:.2e}, {nbytes / 1000:.1f} kB at "
            f"{layer.weight_bits} bits in groups of {layer.group_size}",
        )
        for short, (name, (layer, nbytes, s)) in zip(short_names(list(measured)), measured.items(), strict=True)
        if nbytes and s
    ]
    return dots, {number: f"{bits} bits" for bits, number in series.items()}


def reach_part(predicted: Mapping[str, Any]) -> list[Part]:
    """Return the curves of how much of an error at each step is left at the end, where that is recorded."""
    if "reach" not in predicted:
        return []
    reach = Reach(*(np.array(predicted["reach"][key], np.float64) for key in ("latent", "output")))
    curves = [
        Curve("error in the latent before the step", np.arange(len(reach.latent)), reach.latent),
        Curve("error in the model's output at the step", np.arange(len(reach.output)), reach.output),
    ]
    if not any((curve.mean > 0).any() for curve in curves):
        return []
    end = "picture" if of_what(predicted) is Of.PICTURE else "finished latent"
    note = (
        f"Drawing goes from noise, step 0, to the {end}. The steps that follow mend most of an early error; a late "
        "one stays. The first curve is how much of an error in the latent, the picture in the making, is still there "
        f"in the {end}: 1 is all of it, 0.01 a hundredth. The second is the same for an error in what the model says "
        "at a step, which moves the latent by that step's length alone. Where it is high, rounding costs most."
    )
    label = f"How much of an error at each denoising step is left in the {end}"
    figure = step_chart("reach", curves, "share of the squared error that is left", label)
    return [Part("reach", f"How errors reach the {end}", note, trusted(figure))]
