"""Quantizer ``gptq``: round weights column by column, with the error compensated by the columns not yet rounded.

GPTQ, Frantar et al. 2022 (arXiv 2210.17323), Algorithm 1, for MLX's groups, on grids that are searched and fitted.
Over n calibration inputs x the error of a layer is Σ ‖Wx − Ŵx‖² = n/2 · tr((W − Ŵ) H (W − Ŵ)ᵀ), where H = 2/n Σ x xᵀ.
Where the plan was made by gradients of the picture each x counts by how much an error of the layer's output at its step
reaches the picture.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from typing import Any

from calib.activations.taps import TapPoint, TapSelection, tap_points
from calib.base.errors import ConfigError
from calib.base.files import short_hash
from calib.base.progress import Progress
from calib.models.grids import PART, searched
from calib.models.packed import Packed
from calib.models.rotation import BLOCKS, block_of, rotated
from calib.quantization import strips
from calib.quantization.columns import round_block
from calib.quantization.curvature import Curvature, curvature_of
from calib.quantization.finished import Finished
from calib.quantization.output_side import loss_of, output_hessians, rounded_in_turn
from calib.quantization.quantizer import Quantized, QuantizerInput
from calib.quantization.rotation import rotated_ranges

import mlx.core as mx
import numpy as np

#: Number of columns whose errors are applied to later columns in one product: B of Algorithm 1.
BLOCK = 128
#: Rows of layers with the same inputs that are rounded at once.
MOST_ROWS = 1 << 14
#: Of a calibration by itself: images of which it is 1 at most, and the least.
DAMPED_IMAGES, LEAST_DAMPING = 32, 0.3
#: Largest damping. Long before, columns no longer interact and the result is rounding to nearest.
MOST_DAMPING = 1000
#: Of the procedure; to be raised where it makes something else of the same work.
VERSION = 1
#: Regressions of the searched grids, of columns weighted by H's diagonal.
ROUNDS = 4


def quantize(
    work: QuantizerInput,
    damping: float | None = None,
    act_order: bool = True,
    search: bool = True,
    memory_gb: float = 2.0,
    pictures: int = 0,
    rotation: int = 0,
) -> Quantized:
    """Quantize layers in network order, each on the inputs that result from the quantized layers before it.

    A layer with no smaller error than by rounding to nearest is rounded to nearest. Where ``work.scratch`` is a folder,
    work of minutes that was interrupted goes on there to the same bits.

    Args:
        damping: λ relative to the mean of H's diagonal. The authors' code has 0.01, which overfits a calibration: with
            more, errors of other inputs are smaller, and those of pictures. None: the fewer images the more, 32 by
            their number, but 0.3 at least and 1 at most.
        act_order: round columns with the largest inputs first, an option of the authors' code.
        search: search and fit each group's grid; else MLX's.
        memory_gb: memory for the sums of one replay, 10⁹ bytes; less means more replays of a block. In addition the
            whole Hessian of one input array and its factor take 6 bytes for each pair of columns.
        pictures: pictures drawn for what errors of a layer's outputs do to them together; rows are then rounded in
            turn too, and make up for those before. 0: each by itself. Not for layers after a SiLU, which read one
            vector a picture.
        rotation: rotate inputs and weights in blocks of at most so many channels, 16, 64 or 256; inputs are rounded
            rotated, on ranges of the replayed steps. 0: none.

    Raises:
        ConfigError: an argument is out of range.
    """
    if damping is None:
        images = len(work.states().images) if work.states is not None and work.layers else 1
        damping = float(np.clip(DAMPED_IMAGES / images, LEAST_DAMPING, 1))
    if not 0 <= damping <= MOST_DAMPING:
        allowed = f"must be 0 or more, and {MOST_DAMPING} at most"
        raise ConfigError.bad_value("quantizer.damping", damping, allowed)
    if memory_gb <= 0:
        raise ConfigError.bad_value("quantizer.memory_gb", memory_gb, "must be more than 0")
    if pictures < 0:
        raise ConfigError.bad_value("quantizer.pictures", pictures, "must be 0 or more")
    if rotation not in (0, *BLOCKS):
        raise ConfigError.bad_value("quantizer.rotation", rotation, f"must be 0 (none) or one of {list(BLOCKS)}")
    if pictures:
        work.refuse_streamed(f"gradients of pictures (quantizer.pictures={pictures})")
    kept = Finished(
        work.scratch,
        _key(work, pictures, [damping, act_order, search, memory_gb, rotation]),
        {"ratios": [], "drawn": []},
    )
    outputs: dict[str, Curvature] = {}
    left = work.layers.keys() - kept.layers.keys()
    if pictures and left:
        outputs, kept.rest["drawn"] = output_hessians(work, pictures)
    with Progress("gptq", len(left), "layer", delay=2) as progress:
        for points in tap_groups(work, memory_gb * 1e9):
            if not left & {name for point in points for name in point.names}:
                continue
            hessians = gather_hessians(work, points, kept.layers)
            blocks = {point.name: block_of(_columns(work, point), rotation) for point in points}
            group: dict[str, Packed] = {}
            for point in points:
                curvature = curvature_of(_turned(hessians, point.name, blocks[point.name]), damping, act_order)
                for names in _together(work, [name for name in point.names if name in work.layers]):
                    found, better = _rounded(work, names, curvature, search, outputs, blocks[point.name])
                    group |= found
                    kept.rest["ratios"] += better
                    progress.advance(len(names))
                del curvature  # else it would stay beside the next
            kept.add(group)
    kept.close()
    made = {name: kept.layers[name] for name in work.layers}
    turned = {name: packed.rotation for name, packed in made.items() if packed.rotation}
    ranges = rotated_ranges(work, turned, made)
    work.release()
    rotations, notes = {name: turned[name] for name in ranges}, [_summary(kept.rest["ratios"])]
    return Quantized(made, ranges=ranges, rotations=rotations, notes=notes, drawn=kept.rest["drawn"])


def _key(work: QuantizerInput, pictures: int, others: Sequence[Any]) -> str:
    """Names what is made, by all that it depends on beside weights, states and statistics (``work.scratch``)."""
    plan = {name: asdict(work.plan[name]) for name in work.layers}
    texts = list(work.prompts()) if pictures else []
    return short_hash([VERSION, pictures, list(others), texts, plan], digits=16)


def _turned(hessians: dict[str, list[mx.array]], name: str, block: int) -> mx.array:
    """H of the inputs rotated in blocks, taken out of ``hessians``."""
    hessian = strips.whole(hessians.pop(name))
    return rotated(rotated(hessian, block).T, block) if block else hessian


def tap_groups(work: QuantizerInput, memory: float) -> Iterator[list[TapPoint]]:
    """Yield the taps whose Hessians are collected in one replay, in network order: of one block, within ``memory``."""
    taps = tap_points(work.architecture, TapSelection())
    points = [point for point in taps if work.layers.keys() & set(point.names)]

    def place(point: TapPoint) -> int:
        """The block, or less for taps before all blocks: -2 for embedders, -1 for an input shared by several blocks."""
        blocks = {work.architecture.block_of(name) for name in point.names}
        if len(blocks) > 1:
            return -1
        block = blocks.pop()
        return -2 if block is None else block

    for _, block in groupby(sorted(points, key=place), key=place):
        stage: list[TapPoint] = []
        taken = 0
        for point in block:
            size = strips.nbytes(_columns(work, point))
            if stage and taken + size > memory:
                yield stage
                stage, taken = [], 0
            stage.append(point)
            taken += size
        yield stage


def _columns(work: QuantizerInput, point: TapPoint) -> int:
    columns: int = next(work.layers[name] for name in point.names if name in work.layers).weight.shape[1]
    return columns


def gather_hessians(
    work: QuantizerInput, points: Sequence[TapPoint], replaced: Mapping[str, Packed]
) -> dict[str, list[mx.array]]:
    """H by tap, up to a factor, in strips, summed in float32 on the device.

    ``replaced`` weights replace the model's.
    """
    sums = {point.name: strips.zeros(_columns(work, point)) for point in points}
    shares = {point.name: _shares(work, point) for point in points}

    def record(name: str, activation: mx.array, steps: Sequence[int]) -> mx.array:
        x = activation.reshape(len(steps), -1, activation.shape[-1]).astype(mx.float32)
        share = shares[name]
        weighted = x if share is None else x * mx.array(share[list(steps)].astype(np.float32))[:, None, None]
        flat = (array.reshape(-1, x.shape[-1]) for array in (weighted, x))
        sums[name] = strips.plus_squares(sums[name], *flat)
        return activation

    work.replay(points, record, lambda: [strip for own in sums.values() for strip in own], replaced)
    return sums


def _shares(work: QuantizerInput, point: TapPoint) -> np.ndarray | None:
    """How much an input at each step counts, (num_steps,): by the errors of all outputs of the layers that read it."""
    found = [(work.importance(name), work.layers[name].weight.shape[0]) for name in point.names if name in work.layers]
    known = [rows * share for share, rows in found if share is not None]
    if len(known) < len(found):
        return None
    total: np.ndarray = np.sum(known, axis=0)
    return total / total.max() if total.max() > 0 else None


def _together(work: QuantizerInput, names: Sequence[str]) -> Iterator[list[str]]:
    """Yield layers that can be rounded as the rows of one: of one group size, and not too many rows."""
    for _, same in groupby(sorted(names, key=lambda n: work.plan[n].group_size), key=lambda n: work.plan[n].group_size):
        chosen: list[str] = []
        for name in same:
            rows = sum(len(work.layers[n].weight) for n in [*chosen, name])
            if chosen and rows > MOST_ROWS:
                yield chosen
                chosen = []
            chosen.append(name)
        yield chosen


def _rounded(
    work: QuantizerInput,
    names: Sequence[str],
    curvature: Curvature,
    search: bool,
    outputs: Mapping[str, Curvature],
    block: int,
) -> tuple[dict[str, Packed], list[float]]:
    """Quantize layers with the same inputs; also each one's loss relative to rounding to nearest, 1 where that wins.

    Those of ``outputs`` row after row. Weights are rotated in blocks, unless ``block`` is 0, as ``curvature`` is.
    """
    diagonal = mx.diag(curvature.hessian)
    columns = mx.maximum(diagonal, 1e-3 * diagonal.mean()) + 1e-20

    def nearest(name: str, weight: mx.array) -> Packed:
        plan = work.plan[name]
        if search:
            return searched(weight, plan.weight_bits, plan.group_size, work.dtype, columns, ROUNDS)
        return Packed.nearest(weight, plan.weight_bits, plan.group_size, work.dtype)

    def rounded(name: str, rows: mx.array) -> Packed:
        return gptq_layers([rows], [nearest(name, rows)], curvature)[0]

    def lost(name: str, packed: Packed) -> float:
        def wrong(first: int, last: int) -> mx.array:
            return weights[name][first:last].astype(mx.float32) - packed.rows(first, last).dequantize()

        (rows, width), both = weights[name].shape, outputs.get(name)
        if both is not None:
            return float(np.array(loss_of(wrong(0, rows), curvature, both)))
        at_once = max(1, PART // width)
        losses = [curvature.loss(wrong(first, first + at_once)) for first in range(0, rows, at_once)]
        return float(np.array(mx.concatenate(losses).sum()))

    weights = {name: work.layers[name].weight for name in names}
    if block:
        weights = {name: rotated(weight.astype(mx.float32), block) for name, weight in weights.items()}
    plain = {name: nearest(name, weight) for name, weight in weights.items()}
    alone = [name for name in names if name not in outputs]
    made = {n: rounded_in_turn(weights[n], outputs[n], partial(rounded, n)) for n in names if n in outputs}
    if alone:
        made |= zip(alone, gptq_layers([weights[n] for n in alone], [plain[n] for n in alone], curvature), strict=True)
    found, ratios = {}, []
    for name in names:
        error, before = (lost(name, p) for p in (made[name], plain[name]))
        better = error < before
        found[name] = replace(made[name] if better else plain[name], rotation=block)
        ratios.append(error / before if better else 1.0)
    return found, ratios


def gptq_layers(weights: Sequence[mx.array], grids: Sequence[Packed], curvature: Curvature) -> list[Packed]:
    """Algorithm 1 on ``weights`` (rows, columns) with the same inputs, on ``grids`` of one group size; evaluated."""
    group_size = grids[0].group_size
    sizes = [len(weight) for weight in weights]
    left = mx.concatenate([weight.astype(mx.float32) for weight in weights]).T[mx.array(curvature.order)]
    scales, biases = (
        mx.contiguous(mx.concatenate([getattr(grid, part).astype(mx.float32) for grid in grids]).T)
        for part in ("scales", "biases")
    )
    most = mx.concatenate([mx.full((n,), float(2**grid.bits - 1)) for n, grid in zip(sizes, grids, strict=True)])
    groups = curvature.order // group_size
    columns, rounded = len(left), []
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        own, following = mx.split(curvature.rows(first, last), [last - first], axis=1)
        integers, errors = round_block(left[:BLOCK], own, scales, biases, groups[first:last], most)
        left = left[BLOCK:] - following.T @ errors
        rounded.append(integers.astype(mx.uint8))
        mx.async_eval(left, rounded[-1])
    back = np.argsort(curvature.order)
    parts = mx.split(mx.concatenate(rounded)[mx.array(back)].T, np.cumsum(sizes)[:-1].tolist())
    made = [
        Packed.of_integers(q, grid.scales, grid.biases, grid.bits, group_size)
        for q, grid in zip(parts, grids, strict=True)
    ]
    mx.eval([packed.weight for packed in made])
    return made


def _summary(ratios: Sequence[float]) -> str:
    better = [ratio for ratio in ratios if ratio < 1]
    median = f", at the median {np.median(better):.2g} times as much" if better else ""
    return f"gptq: {len(better)} of {len(ratios)} layers lose less than by rounding to nearest{median}"
