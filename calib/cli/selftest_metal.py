"""Self-test of what a Mac would run: operations of every model that MLX's Metal backend has no kernel for."""

from collections.abc import Callable, Iterator

from calib.activations.observer_mlx import MlxObserver
from calib.activations.taps import TapKind, TapSelection, tap_points, tapped
from calib.activations.weights import weight_sqnr
from calib.analysis.ranges import StepRanges
from calib.base.affine import GROUP_SIZES, WEIGHT_BITS
from calib.base.graphs import watched
from calib.cli.selftest_check import Check
from calib.cli.selftest_collection import SAMPLING_STRIDE, observe_forwards
from calib.cli.selftest_model import CFG_WEIGHT, PROMPTS, SEEDS
from calib.dataset.generate import trajectory
from calib.dataset.settings import SamplerSettings
from calib.models import emoji
from calib.models.model import DiffusionModel, weights
from calib.models.packed import Packed
from calib.models.small import small_model
from calib.quantization.apply import applied
from calib.quantization.model import InputRule, QuantizedModel

import mlx.core as mx
import numpy as np
from mlx import nn

#: The shipped model; SD3 and FLUX in the types that they have on a Mac.
MODELS: dict[str, Callable[[], DiffusionModel]] = {
    "emoji": emoji.load,
    "SD3 in small": lambda: small_model(emoji.load(), "sd3", mx.float16),
    "FLUX in small": lambda: small_model(emoji.load(), "flux", mx.bfloat16),
}


def check_metal() -> Iterator[Check]:
    """Draw, observe, round and draw with rounded weights as on a Mac, and look up every operation's kernel."""
    for name, load in MODELS.items():
        with watched() as graphs:
            exercise(load())
        lacking = "; ".join(f"{what} ({where})" for what, where in [*graphs.lacking.items()][:2])
        label = f"Metal has kernels: {name}, {len(graphs.operations)} kinds of operations"
        yield Check(label, float(len(graphs.lacking)), 0, lacking)


def exercise(model: DiffusionModel) -> None:
    """Do with a model a little of what each stage does."""
    architecture, half = model.architecture, mx.float16 if model.dtype == mx.float32 else model.dtype
    points = tap_points(architecture, TapSelection(TapKind.ALL))
    seen: dict[str, mx.array] = {}
    with tapped(architecture, points, seen.setdefault):
        draw(model)
    for stride, finite_only in ((1, False), (SAMPLING_STRIDE, True)):
        observe_forwards(MlxObserver(stride, finite_only), [seen])
    linear = {name: layer for name, layer in architecture.layers().items() if isinstance(layer, nn.Linear)}
    layers: dict[str, Packed] = {}
    for number, (name, layer) in enumerate(linear.items()):
        sizes = [size for size in GROUP_SIZES if layer.weight.shape[-1] % size == 0]
        if sizes:  # every bit-width and every group size is some layer's
            bits, size = WEIGHT_BITS[number % len(WEIGHT_BITS)], sizes[number % len(sizes)]
            layers[name] = Packed.nearest(layer.weight, bits, size, half)
    weight_sqnr(next(layer for name, layer in linear.items() if name in layers))
    paths = {name: architecture.path(name) for name in layers}
    packed = {f"{path}.weight" for path in paths.values()}
    rest = {path: w.astype(half) for path, w in weights(model.transformer).items() if path not in packed}
    rules = {name: InputRule(StepRanges((0,), (-4.0,), (4.0,)), (8,)) for name in layers}
    with applied(model, QuantizedModel(layers, rest, rules, (500.0,), paths)):
        draw(model)


def draw(model: DiffusionModel) -> None:
    """Draw a picture in one step."""
    guidance = CFG_WEIGHT if model.supports_guidance else 0.0
    *_, final = trajectory(model, PROMPTS[:1], SEEDS[:1], SamplerSettings(num_steps=1, cfg_weight=guidance))
    np.array(model.decode(final.x))
