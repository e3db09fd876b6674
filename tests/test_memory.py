"""The memory plan: its estimates are near what MLX measures, and it gives machines of each size what they can do."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from calib.analysis.backward import Backward
from calib.analysis.by_parts import Rows
from calib.analysis.measure import quantizable
from calib.models import memory
from calib.models.architecture import Conditioning
from calib.models.backward_memory import plan_backward
from calib.models.diffusionkit import sd3_config, sd3_skeleton
from calib.models.memory import (
    LARGEST_BATCH,
    MemoryPlan,
    Needs,
    decoding_bytes,
    device_memory,
    drawing_bytes,
    nbytes,
    plan_memory,
    shrink_factor,
    useful_batch,
)
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import DiffusionModel
from calib.models.small import config_of

import make_standin_checkpoint as standin
import mlx.core as mx
import pytest
from diffusionkit.mlx.clip import CLIPTextModel
from diffusionkit.mlx.mmdit import MMDiT
from diffusionkit.mlx.t5 import SD3T5Encoder
from diffusionkit.mlx.vae import VAEDecoder
from helpers import CHECKOUT
from mlx import nn
from mlx.utils import tree_map
from plain_dit import PlainDiT, PlainDiTArchitecture
from transformers import T5Config

GB = 10**9
SD3 = standin.MODELS["sd3_medium"]
#: What Metal recommends to use of a Mac's memory: two thirds, of large ones three quarters.
MACS = {16: 11_453_246_122, 32: 22_906_503_168, 64: 51_539_607_552}
T5_LAYERS = 24

on_cpu = pytest.mark.skipif(memory.on_gpu(), reason="the estimates were measured on a CPU")


def as_float16(module: nn.Module) -> nn.Module:
    module.update(tree_map(lambda w: w.astype(mx.float16), module.parameters()))
    return module


@cache
def sd3_medium(use_t5: bool, pixels: int) -> Needs:
    """SD3-medium in float16 with guidance, on a GPU; networks without weights have shapes, which is enough."""
    architecture, decoder = sd3_skeleton("sd3_medium", SD3), as_float16(VAEDecoder())
    shapes = standin.TextShapes()
    text = [CLIPTextModel(shapes.clip_l), CLIPTextModel(shapes.clip_g)]
    if use_t5:
        text.append(SD3T5Encoder(T5Config(**{**shapes.t5, "num_layers": T5_LAYERS})))
    size = (pixels // shrink_factor(decoder), pixels // shrink_factor(decoder))
    tokens = architecture.tokens(size) + 77 + (512 if use_t5 else 77)
    return Needs(
        transformer=nbytes(as_float16(architecture.module)),
        decoder=nbytes(decoder),
        text=sum(nbytes(as_float16(network)) for network in text),
        drawing=drawing_bytes(architecture, tokens, True, 2),
        decoding=decoding_bytes(decoder, size),
        useful_batch=useful_batch(tokens, True),
    )


@pytest.mark.parametrize(("idle", "peak", "fits"), [(None, 13, False), (GB, 10, True)])
def test_texts_are_encoded_before_a_streamed_transformer_is_read(idle: int | None, peak: int, fits: bool) -> None:
    plan = MemoryPlan.of(Needs(4 * GB, GB, 8 * GB, GB, GB, idle=idle), 10 * GB, smaller_text="model.stream=true")
    assert (plan.peak, plan.warning is None, plan.keep_text) == (peak * GB, fits, False)
    assert fits or (plan.warning or "").endswith("beside the transformer: model.stream=true")


@pytest.mark.parametrize(
    ("gigabytes", "use_t5", "pixels", "batch_size", "peak", "warning"),
    [
        (16, False, 512, 1, 7.0, None),
        (16, True, 512, 1, 15.4, "the text encoders do not fit beside the transformer: model.use_t5=false"),
        (16, False, 1024, 1, 10.2, None),
        (32, True, 512, 1, 16.5, None),
        (64, True, 512, 1, 16.5, None),
        (64, True, 1024, 1, 19.7, None),
    ],
)
def test_sd3_medium_on_macs(
    gigabytes: int,
    use_t5: bool,
    pixels: int,
    batch_size: int,
    peak: float,
    warning: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "on_gpu", lambda: True)
    plan = MemoryPlan.of(sd3_medium(use_t5, pixels), MACS[gigabytes], smaller_text="model.use_t5=false")
    assert (plan.batch_size, round(plan.peak / GB, 1)) == (batch_size, peak)
    assert plan.keep_text == (warning is None)
    assert plan.warning is None if warning is None else plan.warning is not None and plan.warning.endswith(warning)
    assert plan.describe() in (plan.warning or plan.describe())


def test_the_overnight_experiments_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "on_gpu", lambda: True)
    text = (CHECKOUT / "conf" / "experiment" / "sd3_overnight.yaml").read_text()
    stated = [float(number) for number in re.findall(r"\d+\.\d", "".join(re.findall(r"#   \d+ GB.*", text)))]
    peaks = {
        (use_t5, pixels): round(MemoryPlan.of(sd3_medium(use_t5, pixels), 64 * GB).peak / GB, 1)
        for use_t5, pixels in ((True, 512), (False, 512), (True, 1024))
    }
    usable = {size: round(limit / GB, 1) for size, limit in MACS.items()}
    small = round(MemoryPlan.of(sd3_medium(True, 512), MACS[16]).peak / GB, 1)
    assert stated == [
        *(small, usable[16], peaks[False, 512]),
        *(peaks[True, 512], usable[32]),
        *(peaks[True, 512], usable[64], peaks[True, 1024]),
    ]


ROOMY = Needs(transformer=4 * GB, decoder=GB, text=3 * GB, drawing=GB, decoding=2 * GB)


@pytest.mark.parametrize(
    ("total", "keep_text", "batch_size"),
    [(100, True, 10), (12, True, 4), (10, True, 2), (9.9, False, 4), (8, False, 3), (7, False, 2), (4, False, 1)],
)
def test_text_encoders_stay_where_they_fit(total: float, keep_text: bool, batch_size: int) -> None:
    plan = MemoryPlan.of(ROOMY, int(total * GB))
    assert (plan.keep_text, plan.batch_size) == (keep_text, batch_size)
    assert (plan.warning is None) == (plan.peak <= total * GB)
    assert ("(unloaded while drawing)" in plan.describe()) == (not keep_text)
    assert plan.batch_size <= LARGEST_BATCH


def test_default_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [useful_batch(tokens, guidance=True) for tokens in (80, 250, 1178, 10_000)] == [LARGEST_BATCH, 4, 1, 1]
    assert useful_batch(500, guidance=False) == 4
    assert MemoryPlan.of(replace(ROOMY, useful_batch=3), 100 * GB).batch_size == 3
    assert MemoryPlan.of(replace(ROOMY, useful_batch=3), 100 * GB, batch_size=5).batch_size == 5


def test_wanted_batch() -> None:
    assert MemoryPlan.of(ROOMY, 12 * GB, batch_size=3).describe().endswith("drawing 3.0 GB at batch 3")
    plan = MemoryPlan.of(ROOMY, 12 * GB, batch_size=5)
    assert (plan.batch_size, plan.keep_text, plan.warning) == (5, False, None), "text encoders make room"
    plan = MemoryPlan.of(ROOMY, 12 * GB, batch_size=9)
    assert plan.batch_size == 9 and plan.warning is not None and plan.warning.endswith("choose sampler.batch_size=7")


def test_warnings() -> None:
    plan = MemoryPlan.of(replace(ROOMY, decoding=8 * GB), 12 * GB)
    assert plan.warning is not None and "smaller sampler.image_size" in plan.warning and "\n" not in plan.warning
    plan = MemoryPlan.of(replace(ROOMY, text=9 * GB), 12 * GB)
    assert plan.warning is not None and plan.warning.endswith("do not fit beside the transformer")


def test_this_device(model: DiffusionModel) -> None:
    assert GB < device_memory() == device_memory()
    assert plan_memory(model, True) == plan_memory(model, True, memory=device_memory())
    assert plan_memory(model, True).describe().startswith("memory: 1")


def peak_over_weights(run: Callable[[], mx.array]) -> int:
    mx.eval(run())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(run())
    return int(mx.get_peak_memory() - before)


@on_cpu
@pytest.mark.parametrize("batch_size", [1, 8])
def test_drawing_emoji(model: DiffusionModel, batch_size: int) -> None:
    text = model.encode(["red apple"] * batch_size, 3.0)
    x, timestep, sigma = mx.random.normal((batch_size, *model.latent_shape)), mx.array(500.0), mx.array(0.5)
    mx.eval(text.tokens, text.pooled, x, timestep, sigma)
    measured = peak_over_weights(lambda: model.denoise(x, timestep, sigma, text, 3.0))
    plan = plan_memory(model, True)
    assert batch_size * plan.needs.drawing == pytest.approx(measured, rel=0.25)


@on_cpu
def test_decoding_an_emoji(model: DiffusionModel) -> None:
    x = mx.random.normal((1, *model.latent_shape))
    mx.eval(x)
    estimate = plan_memory(model, True).needs.decoding
    assert estimate == pytest.approx(peak_over_weights(lambda: model.decode(x)), rel=0.25)


@pytest.mark.slow
@on_cpu
def test_blocks_of_sd3() -> None:
    """Two of 24 blocks: one lives at a time."""
    config = replace(sd3_config(SD3), depth_multimodal=2, hidden_size_override=1536, dtype=mx.float32)
    architecture = MMDiTArchitecture(MMDiT(replace(config, max_latent_resolution=16)))
    text = Conditioning(mx.zeros((2, 154, 4096)), mx.zeros((2, 2048)))
    x, timestep = mx.random.normal((2, 16, 16, 16)), mx.array(500.0)
    mx.eval(architecture.module.parameters(), x, text.arrays(), timestep)
    measured = peak_over_weights(lambda: architecture.velocity(x, text, timestep))
    estimate = drawing_bytes(architecture, architecture.tokens((16, 16)) + 154, True, 4)
    assert 0.95 * measured <= estimate <= 1.35 * measured


@on_cpu
def test_decoding_with_sd3s_vae() -> None:
    decoder, latent = VAEDecoder(), mx.random.normal((1, 4, 4, 16))
    mx.eval(decoder.parameters(), latent)
    measured = peak_over_weights(lambda: decoder(latent))
    assert decoding_bytes(decoder, (4, 4)) == pytest.approx(measured, rel=0.15)


def test_backward_plans() -> None:
    """In one piece where that fits for one image, else a block at a time, where the network can be run so."""
    for architecture, divisible in (
        (sd3_skeleton("sd3_medium", SD3), True),
        (PlainDiTArchitecture(PlainDiT(3, 64)), False),
    ):
        large = plan_backward(architecture, (64, 64, 16), True, 4, 154, 10**12)
        assert not large.by_parts and large.batch_size == 4
        one = plan_backward(architecture, (64, 64, 16), True, 1, 154, 10**12).nbytes
        exact, less = (plan_backward(architecture, (64, 64, 16), True, 4, 154, one - short) for short in (0, 1))
        assert (exact.by_parts, exact.batch_size, exact.nbytes) == (False, 1, one)
        assert less.by_parts == divisible and (less.nbytes < one) == divisible
        smallest = plan_backward(architecture, (64, 64, 16), True, 4, 154, 1)
        assert smallest.by_parts == divisible and smallest.batch_size == 1


@on_cpu
def test_backward_peak(model: DiffusionModel) -> None:
    """What a deep network takes is what is planned; by parts a tenth of the activations, beside the gradients."""
    config = replace(config_of("sd3"), hidden_size_override=128, depth_multimodal=12, max_latent_resolution=32)
    architecture = MMDiTArchitecture(MMDiT(config))
    mx.eval(architecture.module.parameters())
    layers = {name: layer for name, layer in architecture.layers().items() if quantizable(layer)}
    text = Conditioning(mx.random.normal((2, 16, 256)), mx.random.normal((2, 256)))
    rows = Rows(mx.random.normal((2, 32, 32, 16)), text, mx.array([500.0]))
    mx.eval(rows.x, text.arrays(), rows.timestep)
    held, gradients = nbytes(architecture.module), sum(4 * layer.weight.size for layer in layers.values())
    beside = {}
    for by_parts in (False, True):
        backward = Backward(replace(model, architecture=architecture), layers, [], by_parts)
        with backward.running():
            mx.clear_cache()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            total = backward.no_gradients()
            for _ in range(2):
                found = backward.run(rows, lambda v: (v**2).sum(), lambda tap: (-8.0, 8.0), total)
                mx.eval(found.rows, found.inputs, found.outputs, total)
            taken = mx.get_peak_memory() - before
        plan = plan_backward(architecture, (32, 32, 16), True, 1, 16, held if by_parts else 10**12)
        assert plan.by_parts == by_parts and 0.7 < (plan.nbytes - held) / taken < 1.4
        beside[by_parts] = taken - gradients
    assert beside[True] < beside[False] / 5
