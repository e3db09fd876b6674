"""What errors of a layer's outputs do to pictures together, and rounding of rows in turn, which makes use of it.

With the Hessian of a layer's weights taken as A ⊗ B, A of its inputs as in GPTQ and B of its outputs, the error of rows
that are rounded already is made up for by those to come, as GPTQ does for columns (YAQA, Tseng et al. 2025,
arXiv 2505.22988). B = Σ G Gᵀ over pictures, G the gradient of a random direction in the picture by the weights.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

from calib.base.progress import Progress
from calib.base.seeds import generator
from calib.models.memory import device_memory
from calib.models.packed import Packed
from calib.quantization.curvature import Curvature, curvature_of
from calib.quantization.quantizer import QuantizerInput
from calib.quantization.texts import drawn_from, others, prompts_of
from calib.quantization.training.pictures import Drawn, picture_loss

import mlx.core as mx
import numpy as np
from mlx import nn

#: Share of the device's memory for B and its factors, of all layers at once.
MEMORY_SHARE = 0.25
#: λ relative to the mean of B's diagonal.
DAMPING = 0.3
#: Groups of rows that are rounded in turn, the most sensitive first.
GROUPS = 8
#: Layers whose input is of this kind are left out: they read one vector a picture, so that B tells little of others.
LEFT_OUT = "post-silu"


def output_hessians(work: QuantizerInput, pictures: int) -> tuple[dict[str, Curvature], list[str]]:
    """B + λI and its factor by layer, of layers that memory allows, and the texts drawn that no image has.

    The first of ``pictures`` are of calibration prompts.

    Raises:
        CalibError: there is no dataset to draw from, or a gradient is not finite.
    """
    (model, states), random = drawn_from(work), generator("quantizer.pictures", 0)
    own = prompts_of(states, states.images)
    more = others(work, states)[: max(0, pictures - len(own))]
    prompts, seeds = [*own, *more], random.randint(1 << 31, size=pictures).tolist()
    # Fewer steps than the user's tell next to nothing (docs/LOG.md).
    wanted = Drawn([prompts[i % len(prompts)] for i in range(pictures)], seeds, states.manifest.num_steps)
    if not (layers := _chosen(work)):
        return {}, []
    sums: dict[str, mx.array] = {}
    guidance = states.manifest.cfg_weight
    with picture_loss(model, layers, guidance, 1) as loss, Progress("outputs", pictures, "picture", 2) as progress:
        for gradients in loss.directions(wanted, seed=0):
            # Each picture counts alike.
            share = 1 / sum(mx.square(g).sum() for g in gradients.values())
            sums = {name: sums.get(name, 0) + share * (g @ g.T) for name, g in gradients.items()}
            mx.eval(sums)
            progress.advance()
    found = {}
    for name in list(sums):
        if (total := sums.pop(name)).any().item():
            found[name] = curvature_of(total, DAMPING, act_order=True)
    return found, more


def _chosen(work: QuantizerInput) -> dict[str, nn.Linear]:
    """The layers that are rounded so: the narrowest first, as far as memory allows, in network order."""
    kind, left = work.architecture.kind, MEMORY_SHARE * device_memory()
    fit = {n: x for n, x in work.layers.items() if kind(n) != LEFT_OUT and len(x.weight) >= 2 * GROUPS}
    found = set()
    for name, layer in sorted(fit.items(), key=lambda item: len(item[1].weight)):
        left -= 3 * 4 * len(layer.weight) ** 2  # the sum, then H and the factor, in float32
        if left >= 0:
            found.add(name)
    return {name: layer for name, layer in fit.items() if name in found}


def rounded_in_turn(weight: mx.array, outputs: Curvature, round_rows: Callable[[mx.array], Packed]) -> Packed:
    """Round groups of rows of ``weight`` (rows, columns), each as the rows before leave it; evaluated.

    Args:
        round_rows: rounds some rows, (n, columns).
    """
    left = weight.astype(mx.float32)[mx.array(outputs.order)]
    made: list[Packed] = []
    for first, last in _groups(len(outputs.order)):
        rounded = round_rows(left[: last - first])
        wrong = left[: last - first] - rounded.dequantize()
        # E = U₁₁⁻ᵀ ΔW: what one row's error is to GPTQ's columns.
        factor, following = mx.split(outputs.rows(first, last), [last - first], axis=1)
        own = mx.linalg.solve_triangular(factor.T, wrong, upper=False, stream=mx.cpu)
        left = left[last - first :] - following.T @ own
        made.append(rounded)
        mx.eval(left)
    back = mx.array(np.argsort(outputs.order))
    packed, scales, biases = (
        mx.concatenate([getattr(p, part) for p in made])[back] for part in ("weight", "scales", "biases")
    )
    mx.eval(packed, scales, biases)
    return Packed(packed, scales, biases, made[0].bits, made[0].group_size)


def loss_of(wrong: mx.array, inputs: Curvature, outputs: Curvature) -> mx.array:
    """tr(ΔW A ΔWᵀ (B + λI)) of ``wrong``, ΔW (rows, columns); lazy."""
    by_outputs = outputs.hessian @ wrong + DAMPING * wrong
    return ((wrong @ inputs.hessian) * by_outputs).sum()


def _groups(rows: int) -> Iterator[tuple[int, int]]:
    yield from pairwise(rows * i // GROUPS for i in range(GROUPS + 1))
