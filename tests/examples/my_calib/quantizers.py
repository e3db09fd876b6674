"""Quantizers of my own."""

from collections.abc import Sequence

from calib.activations.batches import Batch
from calib.models.packed import Packed
from calib.quantization.quantizer import Quantized, QuantizerInput

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten


def shrink(work: QuantizerInput, factors: Sequence[float] = (1.0, 0.9, 0.8, 0.7), batch_size: int = 4) -> Quantized:
    """Round to nearest, groups cut to that factor of their range with the least Σ G² ΔW², G of a random projection."""

    def projected(batch: Batch, noise: mx.array) -> mx.array:
        v = work.architecture.velocity(batch.x, batch.text, batch.timesteps).astype(mx.float32)
        norms = mx.sqrt(mx.sum(mx.square(v), axis=(1, 2, 3), keepdims=True))
        return mx.sum(noise * v / mx.stop_gradient(norms))

    gradient = nn.value_and_grad(work.architecture.module, projected)
    weighting = {name: mx.zeros(layer.weight.shape) for name, layer in work.layers.items()}
    for number, batch in enumerate(work.batches(batch_size)):  # gradients keep all blocks' activations: few at once
        noise = mx.random.normal(batch.x.shape, key=mx.random.key(number))
        found = dict(tree_flatten(gradient(batch, noise)[1]))
        for name in weighting:
            weighting[name] += mx.square(found[f"{work.architecture.path(name)}.weight"])
        mx.eval(weighting)
    made = {}
    for name, layer in work.layers.items():
        plan, groups = work.plan[name], layer.weight.reshape(-1, work.plan[name].group_size)
        low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
        cut = [mx.clip(groups, factor * low, factor * high).reshape(layer.weight.shape) for factor in factors]
        tried = [Packed.nearest(weight, plan.weight_bits, plan.group_size, work.dtype) for weight in cut]
        losses = [mx.sum(weighting[name] * mx.square(layer.weight - packed.dequantize())) for packed in tried]
        made[name] = tried[int(mx.argmin(mx.stack(losses)))]
    return Quantized(made)
