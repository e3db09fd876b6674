"""Replay stored states through the tapped transformer and gather statistics per layer and step.

Images go in blocks, each prompt is encoded once, and no image is drawn again. Each forward's statistics are
computed on the device and evaluated together with its output.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calib.activations.histogram import DTYPES
from calib.activations.statistics import Statistics, is_sound, summarize
from calib.activations.taps import TapPoint, tapped
from calib.dataset.load import load_manifest
from calib.dataset.manifest import FILE, ImageEntry, Manifest
from calib.dataset.store import read_state
from calib.errors import CalibError
from calib.models.memory import plan_memory
from calib.models.model import Conditioning, DiffusionModel
from calib.progress import Progress
from calib.seeds import generator

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class CollectSettings:
    """How statistics are gathered.

    Attributes:
        batch_size: images replayed side by side; None for as many as were drawn side by side.
        histogram_rows: about how many rows of an image stream enter the histogram in one full forward; other
            activations are sampled at the same rate. None for all. Extremes and moments always see every value.
        seed: shifts the sampled rows from forward to forward.
    """

    batch_size: int | None = None
    histogram_rows: int | None = 256
    seed: int = 0


@dataclass
class LayerActivations:
    """What was observed at one tap: a :class:`Statistics` for each step index."""

    point: TapPoint
    dtype: str
    steps: dict[int, Statistics] = field(default_factory=dict)

    def add(self, step: int, statistics: Statistics) -> None:
        self.steps[step] = self.steps[step].merge(statistics) if step in self.steps else statistics


def collect(
    model: DiffusionModel,
    data_dir: Path,
    image_ids: Sequence[int],
    steps: Sequence[int],
    points: Sequence[TapPoint],
    settings: CollectSettings,
) -> dict[str, LayerActivations]:
    """Statistics of ``points`` over the given images and steps, by tap name, blocks' streams apart as well.

    Raises:
        CalibError: the dataset was made by another model, or a state cannot be read.
    """
    manifest = load_manifest(data_dir)
    _check_model(data_dir, manifest, model)
    memory = plan_memory(model, manifest.cfg_weight > 0)
    layers: dict[str, LayerActivations] = {}
    batch_size = settings.batch_size or manifest.batch_size or 1
    stride = histogram_stride(model, manifest.cfg_weight, batch_size, settings.histogram_rows)
    label = f"collect {len(image_ids)} images at {len(steps)} steps"
    blocks = list(batched_ids(image_ids, batch_size))
    with Progress(label, len(blocks) * len(steps), "forward") as progress:
        prompts = [[_prompt(data_dir, manifest.images[i]) for i in block] for block in blocks]
        texts = model.encode_batches(prompts, manifest.cfg_weight, memory.keep_text)
        for number, (block, text) in enumerate(zip(blocks, texts, strict=True)):
            for step in steps:
                x = mx.array(np.stack([read_state(data_dir, manifest, i, step) for i in block]).astype(np.float32))
                phase = float(generator("seed", settings.seed, number, step).rand())
                observed = observe(model, x, text, manifest, step, points, stride, phase)
                for name, (point, dtype, statistics) in observed.items():
                    layers.setdefault(name, LayerActivations(point, dtype)).add(step, statistics)
                progress.advance()
    return layers


def _check_model(data_dir: Path, manifest: Manifest, model: DiffusionModel) -> None:
    """Raise where ``model`` cannot have drawn the dataset; one of the older layout does not name its weights."""
    if manifest.fingerprint not in (None, model.fingerprint):
        raise CalibError(
            f"{data_dir}: made by {manifest.model} with other weights ({manifest.fingerprint}, not {model.fingerprint})"
        )
    if manifest.text_encoders not in (None, model.text_encoders):
        raise CalibError(
            f"{data_dir}: its prompts were encoded by {manifest.text_encoders}, not {model.text_encoders}; set the "
            "model's options as they were when it was drawn"
        )
    if manifest.latent_shape != model.latent_shape:
        raise CalibError(
            f"{data_dir}: holds latents of shape {manifest.latent_shape}, {model.name} has {model.latent_shape}; set "
            "model and sampler.image_size as they were when it was drawn"
        )


def _prompt(data_dir: Path, entry: ImageEntry) -> str:
    if entry.prompt is None:
        raise CalibError(f"{data_dir}: the prompt of image {entry.image_id} is unknown; write it into {FILE}")
    return entry.prompt


def histogram_stride(model: DiffusionModel, cfg_weight: float, batch_size: int, histogram_rows: int | None) -> int:
    """Every how many rows one is counted, so that a full forward's image stream gives ``histogram_rows``.

    Coprime to the number of tokens, or the same places of every image would be sampled.
    """
    if histogram_rows is None:
        return 1
    height, width, _ = model.latent_shape
    tokens = height * width // int(model.transformer.config.patch_size) ** 2
    rows = tokens * batch_size * (2 if cfg_weight > 0 else 1)
    stride = max(1, rows // histogram_rows)
    while math.gcd(stride, tokens) > 1:
        stride += 1
    return stride


def batched_ids(image_ids: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    """Consecutive blocks of at most ``size`` ids."""
    for start in range(0, len(image_ids), size):
        yield tuple(image_ids[start : start + size])


def observe(
    model: DiffusionModel,
    x: mx.array,
    text: Conditioning,
    manifest: Manifest,
    step: int,
    points: Sequence[TapPoint],
    histogram_stride: int,
    phase: float,
) -> dict[str, tuple[TapPoint, str, Statistics]]:
    """Statistics of one forward at ``step`` over states ``x`` (batch, height, width, channels), by tap name."""
    sigma = mx.array(manifest.sigmas[step])
    timestep = mx.array(manifest.timesteps[step]).astype(model.dtype)
    mx.eval(timestep)

    def forward(finite_only: bool) -> dict[str, tuple[mx.Dtype, dict[str, mx.array]]]:
        summaries: dict[str, tuple[mx.Dtype, dict[str, mx.array]]] = {}

        def record(name: str, activation: mx.array) -> None:
            summary = summarize(activation, histogram_stride, phase, finite_only)
            summaries[name] = (activation.dtype, summary)

        with tapped(model.transformer, points, record):
            output = model.denoise(x, timestep, sigma, text, manifest.cfg_weight)
            mx.eval(output, [summary for _, summary in summaries.values()])
        return summaries

    summaries = forward(finite_only=False)
    if not all(is_sound(summary) for _, summary in summaries.values()):
        summaries = forward(finite_only=True)
    by_name = {point.name: point for point in points}
    observed = {}
    for name, (dtype, summary) in summaries.items():
        point = by_name.get(name) or TapPoint(name, "block")
        observed[name] = (point, DTYPES[dtype], Statistics.from_summary(summary, dtype))
    return observed | _pooled_streams(observed, by_name)


def _pooled_streams(observed: dict[str, Any], by_name: dict[str, TapPoint]) -> dict[str, Any]:
    """Blocks with an image and a text stream: both together, under the block's own name."""
    pooled = {}
    for name, point in by_name.items():
        streams = [observed[f"{name}.{stream}"] for stream in ("image", "text") if f"{name}.{stream}" in observed]
        if point.kind == "block" and streams:
            merged = streams[0][2] if len(streams) == 1 else streams[0][2].merge(streams[1][2])
            pooled[name] = (point, streams[0][1], merged)
    return pooled
