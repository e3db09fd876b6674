"""Quantizers, applying a plan to a model, inference that depends on the denoising step, and quantized models on disk.

From Python, with ``run`` the directory of a run of ``calib`` or ``calib collect``:

>>> from functools import partial
>>> from calib.analysis import ranges
>>> from calib.analysis.heuristic import make_plan
>>> from calib.analysis.heuristics import uniform
>>> from calib.analysis.layers import read_summaries
>>> from calib.dataset.generate import trajectory
>>> from calib.dataset.settings import SamplerSettings
>>> from calib.models import emoji
>>> from calib.quantization.apply import applied
>>> from calib.quantization.build import quantize
>>> layers, _ = read_summaries(run)
>>> plan = make_plan(layers, partial(uniform.plan_layer, weight_bits=4, activation_bits=8))
>>> model = emoji.load()
>>> quantized, _ = quantize(model, plan, run / "activations.h5", ranges=ranges.per_step)
>>> f"{quantized.size().average_bits:.2f} bits a weight"
'4.50 bits a weight'
>>> with applied(model, quantized):
...     *_, final = trajectory(model, ["red apple"], [0], SamplerSettings(num_steps=4))
...     picture = model.decode(final.x)
>>> picture.shape
(1, 64, 64, 3)
"""
