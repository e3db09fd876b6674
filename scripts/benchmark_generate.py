"""Drawing a dataset against DiffusionKit's bare sampling loop, in one run: ratios, pauses, memory, replay error.

    python scripts/benchmark_generate.py --batch 1 10                        # the shipped model
    python scripts/benchmark_generate.py --batch 1 8 model=sd3_medium model.use_t5=false
    python scripts/benchmark_generate.py --replay                            # error of stored states by type
    python scripts/benchmark_generate.py --memory                            # peak memory at 10 and 1,000 images

Overrides of the configuration come last. Both sides encode the same prompts, draw from the same seeds and decode one
image at a time; ours keeps every state, and writes and lists every file.
"""

import calib  # isort: skip  (it sees to it that a fast BLAS is loaded before MLX)

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calib.base.device import device_name
from calib.base.seeds import image_seed
from calib.cli.compose import plain
from calib.cli.conf import CONF
from calib.dataset.generate import generate, trajectory
from calib.dataset.sampling import initial_noise, initial_state, noise_levels
from calib.dataset.store import StateDtype
from calib.models.model import DiffusionModel, weights
from calib.stages.build import build
from calib.stages.settings import Settings

import mlx.core as mx
import numpy as np
from diffusionkit.mlx import CFGDenoiser, DiffusionPipeline, sample_euler
from hydra import compose, initialize_config_dir
from mlx import nn

assert calib.__version__


def configured(overrides: Sequence[str]) -> Settings:
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="benchmark"):
        return build(plain(compose("config", overrides=["stage=generate", *overrides])))


class Watched(DiffusionModel):
    """A model that notes when each of its calls began and ended."""

    def denoise(self, *arguments, **named):
        self.calls.append(("denoise", time.perf_counter()))
        return super().denoise(*arguments, **named)

    def decode(self, x):
        self.calls.append(("decode", time.perf_counter()))
        image = super().decode(x)
        mx.eval(image)
        self.calls.append(("decoded", time.perf_counter()))
        return image


def watched(model: DiffusionModel) -> Watched:
    copy = Watched.__new__(Watched)
    vars(copy).update(vars(model), calls=[], _rows={})
    return copy


def bare_pipeline(model: DiffusionModel) -> DiffusionPipeline:
    """DiffusionKit's pipeline around ``model``; adaLN weights are put back from memory, not from disk."""
    pipeline = DiffusionPipeline.__new__(DiffusionPipeline)
    pipeline.mmdit, pipeline.sampler, pipeline.activation_dtype = model.transformer, model.sampler, model.dtype
    adaln = [(name, weight) for name, weight in weights(model.transformer).items() if "adaLN_modulation" in name]

    def load_mmdit(only_modulation_dict: bool = False) -> list[tuple[str, mx.array]]:
        model.transformer.clear_modulation_params_cache()
        return adaln

    pipeline.load_mmdit = load_mmdit
    return pipeline


def bare_block(model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int], settings: Settings) -> float:
    """Seconds of the sampling loop alone; the whole block is encoded before and decoded after it."""
    cfg_weight = settings.generate.sampler.cfg_weight
    text = model.encode(prompts, cfg_weight)
    sigmas = noise_levels(model.sampler, settings.generate.sampler.num_steps)
    noise = mx.stack([initial_noise(seed, model.latent_shape) for seed in seeds])
    x = initial_state(noise, model.sampler, sigmas)
    more = {"conditioning": text.tokens, "cfg_weight": cfg_weight, "pooled_conditioning": text.pooled}
    mx.eval(x, text.tokens, text.pooled)
    start = time.perf_counter()
    x, _ = sample_euler(CFGDenoiser(bare_pipeline(model)), x, sigmas, extra_args=more)
    seconds = time.perf_counter() - start
    for row in range(len(seeds)):
        np.array(model.decode(x[row : row + 1]))
    # What DiffusionKit hangs on the model would count as weights.
    nn.Module.pop(model.transformer, "to_offload", None)
    return seconds


@dataclass
class Timing:
    """Seconds of a block drawn by DiffusionKit's loop, and of one drawn by calib; of each, all and the loop alone."""

    bare: float
    bare_loop: float
    ours: float
    ours_loop: float
    decoding: float
    pause: float


def time_blocks(model: DiffusionModel, settings: Settings, batch: int, blocks: int) -> list[Timing]:
    """``blocks`` pairs of one block each way, in turn; the first pair, which compiles, is left out."""
    sampler = replace(settings.generate.sampler, batch_size=batch)
    timings = []
    ours = watched(model)
    for number in range(blocks + 1):
        ids = range(number * batch, (number + 1) * batch)
        prompts = [settings.generate.prompts[i % len(settings.generate.prompts)] for i in ids]
        model._rows.clear()  # prompts come round again; here each is to be encoded
        start = time.perf_counter()
        bare_loop = bare_block(model, prompts, [image_seed(0, i) for i in ids], settings)
        bare = time.perf_counter() - start
        ours.calls.clear()
        ours._rows.clear()
        with tempfile.TemporaryDirectory() as folder:
            # Two blocks and the time from one to the next: what a long run pays for each.
            generate(
                ours,
                settings.generate.prompts,
                2 * batch,
                Path(folder) / "d",
                sampler,
                dtype=settings.generate.dataset.dtype,
            )
        starts = [when for what, when in ours.calls if what == "denoise"][:: sampler.num_steps]
        decodes = [when for what, when in ours.calls if what == "decode"]
        decoded = [when for what, when in ours.calls if what == "decoded"]
        whole, pause = starts[1] - starts[0], starts[1] - decoded[batch - 1]
        loop, decoding = decodes[0] - starts[0], decoded[batch - 1] - decodes[0]
        timings.append(Timing(bare, bare_loop, whole, loop, decoding, pause))
    return timings[1:]


def show_speed(settings: Settings, batches: Sequence[int], blocks: int) -> None:
    model, sampler, steps = settings.job.model.load(), settings.generate.sampler, settings.generate.sampler.num_steps
    print(f"{model.name}, {sampler.image_size} px, {steps} steps, CFG {sampler.cfg_weight}, {model.dtype}")
    columns = ("batch", "bare loop, s an image", "calib, s an image", "ratio", "ratio of the loops alone", "ms a step")
    columns += ("ms to decode one", "ms from block to block", "share of the time", "images/s")
    print("|".join(("", *columns, "")), "|" + "---|" * len(columns), sep="\n")
    for batch in batches:
        timings = time_blocks(model, settings, batch, blocks)

        def median(value: Callable[[Timing], float], of: Sequence[Timing] = timings) -> float:
            return statistics.median(value(timing) for timing in of)

        ours, pause = median(lambda t: t.ours), median(lambda t: t.pause)
        cells = (
            f"{batch}",
            f"{median(lambda t: t.bare) / batch:.3f}",
            f"{ours / batch:.3f}",
            f"{median(lambda t: t.ours / t.bare):.3f}",
            f"{median(lambda t: t.ours_loop / t.bare_loop):.3f}",
            f"{1000 * median(lambda t: t.ours_loop) / steps:.1f}",
            f"{1000 * median(lambda t: t.decoding) / batch:.1f}",
            f"{1000 * pause:.1f}",
            f"{100 * pause / ours:.2f}%",
            f"{batch / ours:.3f}",
        )
        print("|".join(("", *cells, "")), flush=True)


def show_replay(settings: Settings, images: int) -> None:
    """Relative error of the transformer's output on stored states, per type, over all steps."""
    model, sampler = settings.job.model.load(), settings.generate.sampler
    prompts = settings.generate.prompts[:images]
    text = model.encode(prompts, sampler.cfg_weight)
    states = list(trajectory(model, prompts, [image_seed(0, i) for i in range(images)], sampler))[:-1]

    def output(x: mx.array, step: int) -> np.ndarray:
        timestep = mx.array(states[step].timestep).astype(model.dtype)
        mx.eval(timestep)
        rows = (mx.concatenate([x, x]) if sampler.cfg_weight > 0 else x).astype(model.dtype)
        v = model.velocity(rows, text, timestep)
        return np.array(v.astype(mx.float32)).reshape(len(rows), -1)

    print(f"{model.name}, latents {model.latent_shape}, {images} images, {sampler.num_steps} steps, {model.dtype}")
    print("| stored as | relative output error, mean over steps | at the worst step | MB an image |")
    print("|---|---|---|---|")
    exact = [output(state.x, i) for i, state in enumerate(states)]
    for dtype in StateDtype:
        errors = []
        for i, state in enumerate(states):
            stored = mx.array(dtype.unpack(dtype.pack(state.x)).astype(np.float32))
            error = np.linalg.norm(output(stored, i) - exact[i], axis=1) / np.linalg.norm(exact[i], axis=1)
            errors.append(error.mean())
        size = (len(states) + 1) * int(np.prod(model.latent_shape)) * dtype.bytes / 1e6
        print(f"| {dtype} | {np.mean(errors):.2e} | {np.max(errors):.2e} (step {np.argmax(errors)}) | {size:.2f} |")


def show_memory(overrides: Sequence[str]) -> None:
    """Peak memory of whole processes that draw 10 and 1,000 images."""
    for images in (10, 1000):
        with tempfile.TemporaryDirectory() as folder:
            arguments = [f"num_images={images}", f"data_dir={folder}/d", f"hydra.run.dir={folder}/run"]
            command = [sys.executable, "-m", "calib", "generate", *arguments, "sampler.num_steps=2", *overrides]
            start = time.perf_counter()
            # A process of its own: the peak over all children would hide the smaller one if it came second.
            subprocess.run(command, check=True, capture_output=True)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            print(f"{images} images: peak {peak / 1e6:.0f} MB, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 10], help="batch sizes")
    parser.add_argument("--blocks", type=int, default=5, help="blocks timed for each batch size")
    parser.add_argument("--replay", action="store_true", help="replay errors instead of speed")
    parser.add_argument("--images", type=int, default=8, help="images of --replay")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    given, overrides = parser.parse_known_args()
    print(f"device: {device_name()}")
    if given.memory:
        show_memory(overrides)
    elif given.replay:
        show_replay(configured(overrides), given.images)
    else:
        show_speed(configured(overrides), given.batch, given.blocks)


if __name__ == "__main__":
    main()
