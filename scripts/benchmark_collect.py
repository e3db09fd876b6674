"""What collecting costs over the plain forward, on the same batch in the same run: ratios and peak memory.

    python scripts/benchmark_collect.py --batch 16 2                     # SD3-medium's shapes, random weights (GPU)
    python scripts/benchmark_collect.py --depth 4 --latent 32 --batch 2  # four of its blocks (CPU)
    python scripts/benchmark_collect.py --zimage --batch 8 --steps 2 --forwards 12 --rounds 2   # Z-Image's shapes (GPU)
    python scripts/benchmark_collect.py --emoji --batch 32               # the shipped model
    python scripts/benchmark_collect.py --whole --images 100 --batch 8   # from stored states to finished files (GPU)
    python scripts/benchmark_collect.py --schedules                      # ten schedules against their union (emoji)

The plain forward is the sampler's: one after the other, each waited for. Collecting is what `calib collect` does,
statistics brought to the host included, but for reading states and writing the cache. On a CPU collecting runs the
parts of a batch side by side; "parts alone" is that without observing anything. A batch of n is n rows of the
transformer, without guidance. Each figure is the median over rounds in which all variants take turns.
"""

import calib  # isort: skip  (it sees to it that a fast BLAS is loaded before MLX)

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from calib.activations.collect import Collection
from calib.activations.observer import Observer, TapResult
from calib.activations.observer_mlx import MlxObserver
from calib.activations.replay import Replay, new_observer
from calib.activations.step import CollectSettings
from calib.activations.store import write_activations
from calib.activations.taps import TapPoint, TapSelection, tap_points
from calib.analysis.layers import LayerSummary
from calib.base.device import device_name
from calib.base.files import checksum
from calib.base.layout import ACTIVATIONS
from calib.dataset import timesteps
from calib.dataset.generate import generate
from calib.dataset.load import load_manifest
from calib.dataset.manifest import ImageEntry
from calib.dataset.settings import SamplerSettings, planned_dataset
from calib.dataset.store import StateDtype, StorageFormat, write_trajectory
from calib.models import emoji
from calib.models.architecture import Conditioning, names_in_order
from calib.models.diffusionkit import sd3_config
from calib.models.mflux import zimage
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import DiffusionModel, ModelDtype
from calib.models.parallel import shared_cores
from calib.stages.collect import summarise, summarising

import mlx.core as mx
import numpy as np
from diffusionkit.mlx import SD3LatentFormat
from diffusionkit.mlx.mmdit import MMDiT
from diffusionkit.mlx.sampler import ModelSamplingDiscreteFlow
from diffusionkit.mlx.vae import VAEDecoder
from standin_mflux import ZIMAGE

assert calib.__version__

SD3 = "argmaxinc/mlx-stable-diffusion-3-medium"
#: Text tokens of SD3: the two CLIPs' 77, and without T5 as many of zeros.
TEXT_LENGTH = 154
#: Of a prompt of some twenty words.
ZIMAGE_TEXT = 32
GUIDANCE, PHASE = False, 12345


@dataclass
class Bare:
    """What replaying needs of a model."""

    architecture: MMDiTArchitecture
    dtype: mx.Dtype
    streamed: None = None

    def velocity(self, x: mx.array, text: Conditioning, timestep: float) -> mx.array:
        return self.architecture.velocity(x, text, mx.array(timestep, self.dtype))

    velocities = DiffusionModel.velocities


@dataclass
class Case:
    """A transformer, its batch, and how often histograms sample a row."""

    model: Bare
    points: Sequence[TapPoint]
    x: mx.array
    text: Conditioning
    timestep: float
    stride: int = 1

    def rows(self, count: int) -> "Case":
        tokens = self.model.architecture.tokens(self.x.shape[1:3])
        return replace(self, x=self.x[:count], text=self.text[:count], stride=max(1, count * tokens // 256) | 1)


class Blind:
    """An observer that sees nothing."""

    sound = True

    def begin(self, phase: int) -> None: ...

    def see(self, name: str, x: mx.array) -> None: ...

    def tie(self, x: mx.array) -> mx.array:
        return x

    def end_forward(self) -> list[list[mx.array]]:
        return []

    def settle(self) -> None: ...

    def fetch(self) -> None: ...

    def results(self) -> dict[str, TapResult]:
        return {}


def sd3_case(depth: int, latent: int, dtype: ModelDtype, batch: int) -> Case:
    """SD3-medium's shapes with random weights, of which ``depth`` blocks."""
    mx.random.seed(0)
    whole = sd3_config(SD3)
    config = replace(whole, depth_multimodal=depth, hidden_size_override=whole.hidden_size, dtype=dtype.mlx)
    transformer = MMDiT(config)
    transformer.set_dtype(dtype.mlx)
    mx.eval(transformer.parameters())
    x = mx.random.normal((batch, latent, latent, config.vae_latent_dim)).astype(dtype.mlx)
    tokens = mx.random.normal((batch, TEXT_LENGTH, config.token_level_text_embed_dim)).astype(dtype.mlx)
    pooled = mx.random.normal((batch, config.pooled_text_embed_dim)).astype(dtype.mlx)
    mx.eval(x, tokens, pooled)
    architecture = MMDiTArchitecture(transformer)
    points = tap_points(architecture, TapSelection())
    return Case(Bare(architecture, dtype.mlx), points, x, Conditioning(tokens, pooled), 500.0)


def zimage_case(depth: int, latent: int, dtype: ModelDtype, batch: int) -> Case:
    """Z-Image's shapes with random weights, of which ``depth`` blocks behind its refiners."""
    about = {**ZIMAGE.transformer, "n_layers": depth}
    architecture = zimage.FAMILY.architecture({size: about[size] for size in zimage.SIZES})
    mx.random.seed(0)
    architecture.module.apply(lambda weight: 0.02 * mx.random.normal(weight.shape, dtype.mlx))
    mx.eval(architecture.module.parameters())
    x = mx.random.normal((batch, latent, latent, 16)).astype(dtype.mlx)
    tokens = mx.random.normal((batch, ZIMAGE_TEXT, about["cap_feat_dim"])).astype(dtype.mlx)
    mx.eval(x, tokens)
    points = tap_points(architecture, TapSelection())
    text = Conditioning(tokens, lengths=(ZIMAGE_TEXT,) * batch)
    return Case(Bare(architecture, dtype.mlx), points, x, text, 0.5)


def emoji_case(batch: int) -> Case:
    model = emoji.load()
    text = model.encode(["red apple"] * batch, 0.0)
    x = mx.random.normal((batch, *model.latent_shape))
    mx.eval(x, *text.arrays())
    points = tap_points(model.architecture, TapSelection())
    return Case(Bare(model.architecture, model.dtype), points, x, text, 500.0)


def plain(case: Case, steps: int, forwards: int) -> None:
    for _ in range(steps * forwards):
        rows = case.x.astype(case.model.dtype)
        mx.eval(case.model.velocity(rows, case.text, case.timestep))


def watched(
    case: Case, steps: int, forwards: int, observer: Callable[[], Observer], points: Sequence[TapPoint]
) -> None:
    """Steps of ``forwards`` blocks each; a step's results are fetched when the next has begun, as in collecting."""
    finished: Observer | None = None
    with (
        shared_cores(len(case.x)),
        ThreadPoolExecutor(1) as writer,
        Replay(case.model, points) as replay,  # type: ignore[arg-type]
    ):
        for _ in range(steps):
            seen = observer()
            for number in range(forwards):
                last = replay.forward(seen, case.x, case.text, case.timestep, GUIDANCE, PHASE)
                if number == 0 and finished is not None:
                    finished.fetch()
                    writer.submit(finished.results)
            finished = seen
        mx.eval(last)
        seen.fetch()
        seen.results()


def variants(case: Case, forwards: int, steps: int, everything: bool) -> dict[str, Callable[[], None]]:
    found = {
        "plain forward": lambda: plain(case, steps, forwards),
        "collecting": lambda: watched(case, steps, forwards, lambda: new_observer(case.stride), case.points),
        "parts alone": lambda: watched(case, steps, forwards, Blind, ()),
        "collecting, all rows in the histogram": lambda: watched(
            case, steps, forwards, lambda: new_observer(1), case.points
        ),
    }
    if everything:
        found["collecting, plain MLX operations"] = lambda: watched(
            case, steps, forwards, lambda: MlxObserver(case.stride), case.points
        )
    return found


def show(case: Case, label: str, forwards: int, steps: int, rounds: int, base_too: bool) -> None:
    runs = variants(case, forwards, steps, everything=base_too)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, int] = dict.fromkeys(runs, 0)
    for number in range(rounds + 1):
        for name, run in runs.items():
            mx.synchronize()
            mx.clear_cache()
            mx.reset_peak_memory()
            start = time.perf_counter()
            run()
            if number:  # the first round compiles
                seconds[name].append((time.perf_counter() - start) / (steps * forwards))
                peaks[name] = max(peaks[name], mx.get_peak_memory())
    base, peak = seconds["plain forward"], peaks["plain forward"]
    print(f"\n{label}, batch {len(case.x)}, {len(case.points)} taps")
    print(f"{rounds} rounds of {steps} steps of {forwards} forwards")
    print(
        "| what | ms a forward | ratio to the plain forward | (min–max) | peak MB | ratio |\n|---|---|---|---|---|---|"
    )
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, base, strict=True)]
        cells = (
            name,
            f"{1000 * statistics.median(times):.1f}",
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f}–{max(ratios):.3f}",
            f"{peaks[name] / 1e6:.0f}",
            f"{peaks[name] / peak:.3f}",
        )
        print("| " + " | ".join(cells) + " |", flush=True)


def schedules() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Ten schedules of a sweep over timestep sets."""
    n = 50
    for name, steps in {
        "key": timesteps.key(n),
        "quarters": timesteps.quarters(n),
        "uniform 17": timesteps.uniform(n),
        "uniform 20": timesteps.uniform(n, 20),
        "stride 3": timesteps.stride(n),
        "stride 5": timesteps.stride(n, 5),
        "taqdit": timesteps.taqdit(n),
        "ndtc": timesteps.ndtc(n),
        "phases": timesteps.phases(n),
        "early": timesteps.from_list(n, range(15)),
    }.items():
        yield name, tuple(steps)


def show_schedules(images: int) -> None:
    """Ten collections of one dataset, one after the other, against one collection of their union."""
    model = emoji.load()
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder) / "dataset"
        names = (emoji.FOLDER / "names.txt").read_text().splitlines()
        generate(model, names, images, data_dir, SamplerSettings(num_steps=50, cfg_weight=3.0, batch_size=10))
        manifest, points = load_manifest(data_dir), tap_points(model.architecture, TapSelection())

        def collect(cache: str, steps: Sequence[int]) -> float:
            start = time.perf_counter()
            collection = Collection(
                model.architecture,
                lambda: model,
                data_dir,
                manifest,
                range(images),
                points,
                CollectSettings(),
                Path(folder) / cache,
            )
            collection.collect(steps)
            collection.records(steps)
            return time.perf_counter() - start

        everything = list(schedules())
        union = sorted({step for _, steps in everything for step in steps})
        collect("warm", union[:2])
        whole = collect("union", union)
        each = {name: collect("each", steps) for name, steps in everything}
        again = sum(collect("each", steps) for _, steps in everything)
    for name, seconds in each.items():
        print(f"| {name} | {seconds:.1f} s |")
    total = sum(each.values())
    print(f"{images} images, union of {len(union)} states: {whole:.1f} s")
    print(f"ten schedules: {total:.1f} s, {total / whole:.3f}×")
    print(f"the ten again, from the cache: {again:.2f} s")


def whole_model(latent: int, depth: int = 24) -> DiffusionModel:
    """SD3-medium's transformer with random weights; its text is random numbers."""
    case = sd3_case(depth, latent, ModelDtype.BFLOAT16, 1)

    def encode(text: str) -> Conditioning:
        mx.random.seed(len(text))
        return Conditioning(mx.random.normal(case.text.tokens.shape), mx.random.normal(case.text.pooled.shape))

    decoder = VAEDecoder(16, 3, [128, 256, 512, 512], 3, 32)
    return DiffusionModel(
        name="sd3_shapes",
        architecture=case.model.architecture,
        sampler=ModelSamplingDiscreteFlow(shift=3.0),
        latent_format=SD3LatentFormat(),
        encode_text=encode,
        decoder=decoder,
        decode_latents=decoder,
        dtype=case.model.dtype,
        latent_shape=(latent, latent, 16),
        text_length=TEXT_LENGTH,
        token_count=len,
        max_prompt_tokens=77,
        text_encoders="random",
    )


def show_whole(latent: int, images: int, batch: int) -> None:
    """From stored states of 17 steps to finished files, then the same again from the cache."""
    model, steps = whole_model(latent), range(17)
    with tempfile.TemporaryDirectory() as folder:
        data_dir, rng = Path(folder) / "dataset", np.random.default_rng(0)
        settings = SamplerSettings(num_steps=16, cfg_weight=5.0, batch_size=batch)
        manifest = planned_dataset(model, settings, batch, 0, StorageFormat.HDF5, StateDtype.BFLOAT16, None)
        for i in range(images):
            states = StateDtype.BFLOAT16.pack(mx.array(rng.standard_normal((17, *model.latent_shape), np.float32)))
            samples = write_trajectory(data_dir, i, states, manifest, {})
            checksums = {name: checksum(data_dir / name) for name in samples}
            manifest.images[i] = ImageEntry(i, f"{i:0{i + 1}}", i, 5.0, 16, "", "", samples, checksums)
        points = tap_points(model.architecture, TapSelection())
        order = {name: place for place, name in enumerate(names_in_order(model.architecture))}
        place = (data_dir, manifest, range(images), points, CollectSettings(), Path(folder) / "cache")
        plain(sd3_case(24, latent, ModelDtype.BFLOAT16, 2 * batch), 1, 3)
        for label in ("first", "again, from the cache"):
            laps = [time.perf_counter()]
            collection = Collection(model.architecture, lambda: model, *place)
            collection.collect(steps)
            laps.append(time.perf_counter())
            run = Path(folder) / label
            known: dict[str, LayerSummary] = {}
            where = (run / ACTIVATIONS, collection.source(steps), points, manifest, steps)
            write_activations(*where, {}, {}, order, watch=summarising(known, steps, manifest.num_steps))
            laps.append(time.perf_counter())
            summarise(run, known)
            laps.append(time.perf_counter())
            names = ("collecting", "activations.h5", "layer_statistics.json")
            each = ", ".join(f"{name} {b - a:.1f} s" for name, (a, b) in zip(names, pairwise(laps), strict=True))
            size = (run / ACTIVATIONS).stat().st_size / 1e6
            print(f"{images} images × 17 steps, batch {batch}, {label}: {laps[-1] - laps[0]:.1f} s")
            print(f"  {each}; {size:.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 2], help="rows of a forward")
    parser.add_argument("--depth", type=int, help="transformer blocks; default: all")
    parser.add_argument("--latent", type=int, default=64, help="height and width of a latent")
    parser.add_argument("--dtype", type=ModelDtype, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--emoji", action="store_true", help="the shipped model")
    parser.add_argument("--zimage", action="store_true", help="Z-Image's shapes")
    parser.add_argument("--schedules", action="store_true", help="ten schedules against their union")
    parser.add_argument(
        "--whole", action="store_true", help="from stored states to finished files, SD3-medium's shapes"
    )
    parser.add_argument("--images", type=int, default=20, help="images of --schedules and --whole")
    parser.add_argument("--forwards", type=int, help="forwards of a step; default: 100 images with guidance")
    parser.add_argument("--steps", type=int, default=3, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--base", action="store_true", help="also the plain MLX operations on a GPU: slow there")
    given = parser.parse_args()
    print(f"device: {device_name()}, MLX {mx.__version__}")
    if given.schedules:
        show_schedules(given.images)
        return
    if given.whole:
        show_whole(given.latent, given.images, given.batch[0])
        return
    gpu = mx.default_device().type == mx.DeviceType.gpu
    dtype = given.dtype or (ModelDtype.BFLOAT16 if gpu else ModelDtype.FLOAT32)
    largest = max(given.batch)
    if given.emoji:
        case, label = emoji_case(largest), "emoji"
    else:
        name, made, depth = ("Z-Image", zimage_case, 30) if given.zimage else ("SD3", sd3_case, 24)
        depth = given.depth or depth
        case = made(depth, given.latent, dtype, largest)
        label = f"{name} shapes, {depth} blocks, {given.latent}×{given.latent}, {dtype}"
    for batch in given.batch:
        show(case.rows(batch), label, given.forwards or max(1, 200 // batch), given.steps, given.rounds, given.base)


if __name__ == "__main__":
    main()
