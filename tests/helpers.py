"""Reference implementations in float64 NumPy, and ways to run the command line."""

import contextlib
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.activations.observer_mlx import is_sound, summarize, tap_result, to_host
from calib.activations.statistics import PERCENTILES, Statistics
from calib.base.errors import ConfigError
from calib.base.files import checksum
from calib.base.progress import note
from calib.cli.main import main
from calib.dataset.load import load_manifest
from calib.dataset.settings import SamplerSettings
from calib.models.architecture import Conditioning
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
import pytest
from diffusionkit.mlx import DiffusionPipeline
from diffusionkit.mlx.mmdit import MMDiT
from mlx.utils import tree_flatten
from numpy.typing import NDArray

CHECKOUT = Path(__file__).parents[1]
PROMPTS = ("red apple", "octopus", "rocket", "sunflower", "green heart")
SAMPLER = SamplerSettings(num_steps=8, cfg_weight=3.0, batch_size=2)

#: Steps of the shared statistics; 8 is the finished latent.
STEPS = (0, 3, 8)

#: A whole job in a second or so, without its page.
TINY = (
    *("num_images=2", "sampler.num_steps=4", "timestep_schedule=quarters", "sampler.batch_size=2"),
    *("analysis=range", "ranges=static", "quantizer=rtn"),  # of all plans the one that takes the least time
    *("evaluation.num_images=2", "evaluation.steps=2", "quantizer.search=false", "report=none"),
)


def tiny(*more: str) -> list[str]:
    """TINY and ``more``, without what ``more`` sets anew, and without parameters of a quantizer that it replaces."""
    keys = {argument.split("=")[0] for argument in more}
    return [t for t in TINY if (key := t.split("=")[0]) not in keys and key.split(".")[0] not in keys] + [*more]


MLX_DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)


def from_bits(bits: NDArray[Any], dtype: str) -> mx.array:
    """The array whose bit patterns are ``bits``."""
    return mx.array(bits.astype(np.uint32 if dtype == "float32" else np.uint16)).view(MLX_DTYPES[dtype])


def values_of_bits(bits: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    """What bit patterns stand for, by NumPy alone (which has no bfloat16)."""
    if dtype == "float16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    wide = bits.astype(np.uint32) << 16 if dtype == "bfloat16" else bits.astype(np.uint32)
    with np.errstate(invalid="ignore"):
        return wide.view(np.float32).astype(np.float64)


def statistics_of(x: mx.array, **options: Any) -> Statistics:
    """Statistics of ``x`` (rows, …, channels), or of one row's tokens (tokens, channels), summarised at once."""
    summary = summarize(x if x.ndim > 2 else x[None], **options)
    mx.eval(summary)
    return tap_result(to_host(summary), name_of(x)).statistics


def sound(x: mx.array) -> bool:
    """Whether a plain summary of ``x`` (tokens, channels) can be used."""
    return is_sound(to_host(summarize(x[None])))


def name_of(x: mx.array) -> str:
    return next(name for name, dtype in MLX_DTYPES.items() if dtype == x.dtype)


def check_config_error(call: Callable[[], object], words: Sequence[str]) -> None:
    """``call`` must end in a configuration error of one line that holds every one of ``words``."""
    with pytest.raises(ConfigError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def float64(x: mx.array) -> NDArray[np.float64]:
    """An array's values, exactly."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


def pipeline_of(model: DiffusionModel) -> DiffusionPipeline:
    """DiffusionKit's pipeline around ``model``, which must be a copy: drawing empties its adaLN weights for a while."""
    pipeline = DiffusionPipeline.__new__(DiffusionPipeline)
    pipeline.mmdit = model.transformer
    pipeline.sampler = model.sampler
    pipeline.activation_dtype = model.dtype
    pipeline.latent_format = model.latent_format
    pipeline.decoder = model.decode_latents
    weights = tree_flatten(model.transformer.parameters())
    adaln = [(name, weight) for name, weight in weights if "adaLN_modulation" in name]

    def load_mmdit(only_modulation_dict: bool = False) -> list[tuple[str, mx.array]]:
        """What DiffusionKit re-reads from the checkpoint after each image."""
        assert only_modulation_dict
        model.transformer.clear_modulation_params_cache()
        return adaln

    pipeline.load_mmdit = load_mmdit
    return pipeline


def check_statistics(statistics: Statistics, values: NDArray[np.float64], dtype: str) -> None:
    """``statistics`` are those of ``values`` (rows, channels), every row of which entered the histogram.

    Exact: count, minimum, maximum, and the percentiles of 16-bit types. The mean to 1e-6 of the channel's rms, the
    standard deviation to 1e-5; percentiles of float32 to 0.4%, as bins of the top 16 bits are read at their midpoint.
    """
    np.testing.assert_array_equal(statistics.count, len(values))
    np.testing.assert_allclose(statistics.minimum, values.min(axis=0), rtol=0, atol=SMALLEST_NORMAL)
    np.testing.assert_allclose(statistics.maximum, values.max(axis=0), rtol=0, atol=SMALLEST_NORMAL)
    rms = np.sqrt(np.mean(values**2, axis=0))
    spread = values.std(axis=0)
    assert np.all(np.abs(statistics.mean - values.mean(axis=0)) <= 1e-6 * rms + SMALLEST_NORMAL)
    assert np.all(np.abs(statistics.std - spread) <= 1e-5 * spread + 1e-7 * rms + SMALLEST_NORMAL)
    low, high, mean, std, total = statistics.over_channels()
    assert total == values.size == statistics.histogram.total
    assert (low, high) == pytest.approx((values.min(), values.max()), rel=0, abs=SMALLEST_NORMAL)
    assert abs(mean - values.mean()) <= 1e-6 * np.sqrt(np.mean(values**2)) + SMALLEST_NORMAL
    assert std == pytest.approx(values.std(), rel=1e-5, abs=1e-7 * np.sqrt(np.mean(values**2)) + SMALLEST_NORMAL)
    check_percentiles(statistics.percentiles(), values, dtype)


def check_percentiles(found: dict[str, float], values: NDArray[np.float64], dtype: str) -> None:
    """``found`` are ``numpy.percentile`` of ``values``, to the precision of the type's bins."""
    assert list(found) == list(PERCENTILES)
    expected, below, above = (
        np.percentile(values, list(PERCENTILES.values()), method=method) for method in ("linear", "lower", "higher")
    )
    if dtype != "float32":
        assert list(found.values()) == pytest.approx(expected.tolist(), rel=1e-12, abs=1e-300)
        return
    # Interpolation between values of opposite sign may be near zero: the error is that of the two neighbours.
    allowed = 0.004 * np.maximum(np.abs(below), np.abs(above)) + SMALLEST_NORMAL
    assert np.all(np.abs(list(found.values()) - expected) <= allowed), (found, expected)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str


def well(outcome: Outcome) -> Outcome:
    """The outcome of a command that must end well."""
    assert outcome.status == 0, outcome.err
    return outcome


def run_here(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> Outcome:
    """``calib`` with ``arguments``, in this process and the current folder."""
    capsys.readouterr()
    status = exit_status(arguments)
    captured = capsys.readouterr()
    return Outcome(status, captured.out, captured.err)


def run_in(folder: Path, *arguments: str) -> Outcome:
    """``calib`` in this process, in ``folder``; for fixtures, which have no capsys."""
    with contextlib.chdir(folder), redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = exit_status(arguments)
    return Outcome(status, out.getvalue(), err.getvalue())


def exit_status(arguments: Sequence[str]) -> int:
    """How ``calib`` ends with ``arguments``, in this process, which is afterwards as it was."""
    note.cache_clear()  # of each a process shows one
    command, environment = sys.argv, dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
    finally:
        sys.argv = command
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
    code = end.value.code
    return code if isinstance(code, int) else int(code is not None)


def command(*arguments: str) -> list[str]:
    """The command line of a ``calib`` process of its own."""
    return [sys.executable, "-m", "calib", *arguments]


def environment() -> dict[str, str]:
    """A process started in any folder imports this checkout, and else what this one does."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    path = [str(CHECKOUT), *filter(None, [inherited.get("PYTHONPATH")])]
    return inherited | {"PYTHONPATH": os.pathsep.join(path)}


def run_process(folder: Path, *arguments: str) -> Outcome:
    """``calib`` in a process of its own, in ``folder``."""
    done = subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def start_process(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """``calib`` in a process of its own, in ``folder``, left running."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*arguments), cwd=folder, env=environment(), stdout=pipe, stderr=pipe, text=True)


def run_without_rights(folder: Path, *arguments: str) -> Outcome:
    """``calib`` in ``folder`` by a process that may not write where permissions forbid it, as root's else may."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*drop, *command(*arguments)], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def lines_of(err: str) -> list[str]:
    """calib's own lines among those about progress."""
    assert "Traceback" not in err
    assert "Logging error" not in err
    return [line.removeprefix("calib: ") for line in err.splitlines() if line.startswith("calib: ")]


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and stderr."""
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any], pause: float = 0.003) -> None:
    """Until ``condition`` holds or ``process``, which should bring it about, has ended."""
    end = time.monotonic() + 60
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "it does not come about"
        time.sleep(pause)


def listed(data_dir: Path) -> set[int]:
    """Ids of the images of a dataset, of none where there is no dataset yet; each must be sound."""
    if not (data_dir / "manifest.json").exists():
        return set()
    images = load_manifest(data_dir).images
    for entry in images.values():
        assert set(entry.checksums) == set(entry.files)
        assert {name: checksum(data_dir / name) for name in entry.files} == entry.checksums
    return set(images)


def temporaries(folder: Path) -> set[Path]:
    """Half-written files below ``folder``."""
    return {Path(root) / name for root, _, names in os.walk(folder) for name in names if name.endswith(".tmp")}


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below ``folder`` by relative name; locks and hidden temporary files left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip_byte(path: Path, position: int) -> None:
    """Damage one byte of a file, in place."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def is_one_clear_line(outcome: Outcome, status: int = 2) -> str:
    """The one line of ``outcome``, which must be all that it says."""
    assert outcome.status == status, outcome
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.startswith("calib: ")
    assert outcome.out == ""
    return outcome.err.removeprefix("calib: ").strip()


def fill(disk: Path, room: int = 0) -> Path:
    """A file that takes the rest of ``disk``, but for about ``room`` bytes."""
    ballast = disk / "ballast"
    take = shutil.disk_usage(disk).free - room
    ballast.write_bytes(bytes(take))
    assert shutil.disk_usage(disk).free <= room
    return ballast


def velocity(transformer: MMDiT, x: mx.array, tokens: mx.array, pooled: mx.array, timestep: mx.array) -> mx.array:
    """The output of a DiffusionKit MMDiT."""
    return MMDiTArchitecture(transformer).velocity(x, Conditioning(tokens, pooled), timestep)
