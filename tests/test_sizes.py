"""Data of others takes no more memory than its size allows: what a file announces is compared with it first."""

import io
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from calib.activations.cache import StepCache
from calib.activations.reader import ActivationFile
from calib.base.errors import CalibError
from calib.base.files import MOST_TEXT, checksum, read_json, read_text, write_json
from calib.base.layout import ACTIVATIONS
from calib.dataset.arrays import read_npy
from calib.dataset.images import open_picture
from calib.dataset.latents import features
from calib.dataset.load import load_manifest
from calib.dataset.store import read_state
from calib.dataset.verify import verify
from calib.runs.record import read_yaml

import h5py
import numpy as np
import pytest
from numpy.lib import format as npy

#: More memory than any of these files may take: 64 MiB, and what Python itself needs.
ROOM = 80 << 20


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """No test takes more memory than :data:`ROOM`, as Python and NumPy count it."""
    tracemalloc.start(1)
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < ROOM


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A run directory that may be changed."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(MOST_TEXT + 1)


def holding(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content) and None


#: Five lists of 99 entries, each the one before: 99⁵ words.
ALIASES = "a: &a [x]\n" + "".join(f"{n}: &{n} [{', '.join(99 * ['*' + p])}]\n" for p, n in ("ab", "bc", "cd", "de"))

TEXTS: Mapping[str, tuple[Callable[[Path], None], Callable[[Path], object], str]] = {
    "too long": (sparse, read_json, "has more than 64 MiB"),
    "a pipe": (pipe, read_json, "cannot be read (Not a regular file)"),
    "a device": (endless, read_text, "cannot be read (Not a regular file)"),
    "a folder": (lambda path: path.mkdir(), read_json, "cannot be read (Is a directory)"),
    "brackets": (holding("[" * 100_000), read_json, "not valid JSON"),
    "digits": (holding("9" * 10_000), read_json, "not valid JSON"),
    "aliases": (holding(ALIASES), read_yaml, "not valid YAML"),
    "a long YAML": (sparse, read_yaml, "has more than 64 MiB"),
    "a tag": (holding("!!python/object/apply:os.getcwd []"), read_yaml, "not valid YAML"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_texts(case: str, tmp_path: Path) -> None:
    damage, read, words = TEXTS[case]
    damage(tmp_path / "file")
    with pytest.raises(CalibError) as error:
        read(tmp_path / "file")
    assert str(error.value).startswith(f"{tmp_path / 'file'}: {words}") and "\n" not in str(error.value)


def header_of(shape: tuple[int, ...], kind: str = "<f4") -> bytes:
    """The beginning of a .npy file; what it announces need not follow."""
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


def hostile_pickle() -> bytes:
    class Hostile:
        def __reduce__(self) -> Any:
            return os._exit, (7,)

    return header_of((1,), "|O") + pickle.dumps(Hostile())


ARRAYS = {
    "announced": header_of((1 << 40,)) + bytes(100),
    "cut off": header_of((100,)) + bytes(396),
    "pickled": hostile_pickle(),
    "no array": b"PK",
    "": b"",
}


def archive(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)


def dense(path: Path, name: str, **how: Any) -> None:
    """Replace a dataset of an HDF5 file by another."""
    with h5py.File(path, "r+") as file:
        attributes = dict(file[name].attrs) if name in file else {}
        file.pop(name, None)
        made = file.create_dataset(name, **how)
        made.attrs.update({key: value for key, value in attributes.items() if key == "dtype"})


HUGE = {"shape": (3, 1 << 20, 1 << 20, 16), "dtype": "f2", "chunks": (1, 1, 1, 16)}
BOMB = {"data": np.zeros((1, 1 << 26), np.uint16), "chunks": (1, 1 << 20), "compression": "gzip"}
CHUNK = {"shape": (1, 1), "dtype": "u1", "chunks": (1 << 15, 1 << 15), "maxshape": (None, None)}
TEXT = {"data": ["text"] * 3, "dtype": h5py.string_dtype()}


@pytest.mark.parametrize("content", ARRAYS)
def test_latents(content: str, dataset: Path) -> None:
    manifest = load_manifest(dataset)
    path = dataset / manifest.images[1].latent_filename
    path.write_bytes(ARRAYS[content])
    with pytest.raises(CalibError, match=r"cannot be read \("):
        features(dataset, manifest, [1])
    assert verify(dataset).bad_images == {1}


@pytest.mark.parametrize("content", ARRAYS)
def test_states_of_numpy(content: str, npz_dataset: Path) -> None:
    manifest = load_manifest(npz_dataset)
    path = npz_dataset / manifest.images[1].samples[0]
    archive(path, x=ARRAYS[content])
    with pytest.raises(CalibError, match=r"cannot be read \("):
        read_state(npz_dataset, manifest, 1, 0)


def test_an_archive_that_unpacks_to_much_more(npz_dataset: Path) -> None:
    manifest = load_manifest(npz_dataset)
    tracemalloc.stop()  # made here, it takes the memory that it must not take when read
    archive(npz_dataset / manifest.images[1].samples[0], x=header_of((1 << 25,)) + bytes(1 << 27))
    tracemalloc.start(1)
    with pytest.raises(CalibError, match="unpacks to 134,2"):
        read_state(npz_dataset, manifest, 1, 0)


@pytest.mark.parametrize("how", [HUGE, CHUNK, TEXT], ids=["huge", "chunk", "text"])
def test_states_of_hdf5(how: Mapping[str, Any], dataset: Path) -> None:
    manifest = load_manifest(dataset)
    dense(dataset / manifest.images[1].samples[0], "x", **how)
    with pytest.raises(CalibError, match="too much for its file"):
        read_state(dataset, manifest, 1, 0)


@pytest.mark.parametrize("name", ["step_index", "layers/x_embedder/channel_min", "layers/x_embedder/histogram_counts"])
@pytest.mark.parametrize("how", [HUGE, BOMB, CHUNK, TEXT], ids=["huge", "bomb", "chunk", "text"])
def test_statistics(how: Mapping[str, Any], name: str, run: Path) -> None:
    path = run / ACTIVATIONS
    dense(path, name, **how)

    def read() -> None:
        with ActivationFile(path) as file:
            file.by_step("x_embedder")

    with pytest.raises(CalibError, match=r"damaged or not an activations\.h5 .*too much for its file"):
        read()


@pytest.mark.parametrize("steps", [1 << 40, 0, -1])
def test_a_trajectory_without_an_end(steps: int, run: Path) -> None:
    with h5py.File(run / ACTIVATIONS, "r+") as file:
        file.attrs["num_steps"] = steps
    with ActivationFile(run / ACTIVATIONS) as file, pytest.raises(CalibError, match=f"num_steps={steps}"):
        file.levels()


def test_statistics_in_a_pipe(run: Path) -> None:
    pipe(run / ACTIVATIONS)
    with pytest.raises(CalibError, match="Not a regular file"):
        ActivationFile(run / ACTIVATIONS)


@pytest.mark.parametrize(
    "change", [{"batch_size": 1 << 40}, {"num_steps": 1 << 40}, {"latent_shape": [1 << 20, 1 << 20, 16]}], ids=str
)
def test_manifests(change: Mapping[str, Any], dataset: Path) -> None:
    path = dataset / "manifest.json"
    write_json(path, read_json(path) | change)
    with pytest.raises(CalibError, match=r"damaged manifest|shape"):
        read_state(dataset, load_manifest(dataset), 0, 0)


def test_an_image_of_a_huge_id(dataset: Path) -> None:
    path = dataset / "manifest.json"
    document = read_json(path)
    document["images"][3]["image_id"] = 1 << 40
    write_json(path, document)
    assert f"{(1 << 40) - 3} images not drawn below the highest id (3, 4, 5, 6, 7, …)" in verify(dataset).notes


def test_an_older_manifest(npz_dataset: Path) -> None:
    images = [{"image_id": 0}]
    write_json(npz_dataset / "manifest.json", {"num_steps": 1 << 40, "cfg_scale": 1.0, "images": images})
    with pytest.raises(CalibError, match=f"num_steps={1 << 40}"):
        load_manifest(npz_dataset)


def test_a_cached_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = StepCache(tmp_path, {})
    cache.folder.mkdir(parents=True)
    for content in ARRAYS.values():
        archive(cache.path(0), header=content)
        assert cache.load(0) is None
    assert "step_0000.npz: cannot be used" in capsys.readouterr().err


def png(width: int, height: int) -> bytes:
    """The beginning of a picture that announces a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/x) (w) file\n"


@pytest.mark.parametrize("content", [png(1 << 14, 1 << 14), png(1 << 30, 1 << 30), POSTSCRIPT, b"GIF89a", b""])
def test_pictures(content: bytes, dataset: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = dataset / "images" / "0001.png"
    path.write_bytes(content)
    with pytest.raises((ValueError, OSError)), open_picture(path) as picture:
        picture.load()
    assert verify(dataset).bad_images == {1}
    assert not recwarn.list


def test_npy_of_every_size_is_read(tmp_path: Path) -> None:
    for shape in ((), (0,), (3,), (2, 3, 4)):
        array = np.random.RandomState(0).randn(*shape)
        np.save(tmp_path / "array.npy", array)
        np.testing.assert_array_equal(read_npy(tmp_path / "array.npy"), array)


def test_a_checksum_of_a_pipe(tmp_path: Path) -> None:
    pipe(tmp_path / "pipe")
    with pytest.raises(OSError, match="Not a regular file"):
        checksum(tmp_path / "pipe")
