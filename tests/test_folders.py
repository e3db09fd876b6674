"""Two folders of pictures drawn by anybody: paired by name, and measured without a model."""

import base64
import io
import json
import os
import shutil
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from calib.base.errors import CalibError
from calib.cli.commands import names_folders
from calib.evaluation.folders import BATCH, compare_folders
from calib.evaluation.metrics import bootstrap, psnr, ssim
from calib.evaluation.pictures import read_picture
from calib.runs.pages.pictures import data_address

import numpy as np
import pytest
from helpers import Outcome, is_one_clear_line, run_here, well
from numpy.typing import NDArray
from PIL import Image

Calib: TypeAlias = Callable[..., Outcome]
#: EXIF's tag of a picture's orientation, and how each value is turned upright.
TAG = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
COUNT = 5


def picture(seed: int, size: tuple[int, int] = (24, 16)) -> NDArray[np.uint8]:
    """(height, width, 3), smooth."""
    coarse = np.random.RandomState(seed).randint(0, 256, (4, 4, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


def noisy(pixels: NDArray[np.uint8], seed: int, amount: float = 9) -> NDArray[np.uint8]:
    noise = np.random.RandomState(1000 + seed).randn(*pixels.shape) * amount
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def save(pixels: NDArray[np.uint8], path: Path) -> None:
    Image.fromarray(pixels).save(path)


@pytest.fixture
def calib(folder: Path, capsys: pytest.CaptureFixture[str]) -> Calib:
    """``calib evaluate`` where folders a and b have five pictures each; b's are a's with more and more noise."""
    for name in "ab":
        Path(name).mkdir()
    for number in range(COUNT):
        save(picture(number), Path(f"a/p{number}.png"))
        save(noisy(picture(number), number, 2 + 3 * number), Path(f"b/p{number}.png"))
    return lambda *arguments: run_here(("evaluate", *arguments), capsys)


def opened(path: str) -> NDArray[np.float64]:
    return np.asarray(Image.open(path)) / 255


def test_values_are_those_of_the_metrics_with_intervals_over_pairs(calib: Calib) -> None:
    document = json.loads(well(calib("a", "b", "--json")).out)
    pairs = {pair["name"]: pair for pair in document["pairs"]}
    for name, metric in {"psnr": psnr, "ssim": ssim}.items():
        expected = [metric(opened(f"a/p{i}.png"), opened(f"b/p{i}.png")) for i in range(COUNT)]
        assert [pairs[f"p{i}"][name] for i in range(COUNT)] == pytest.approx(expected, rel=1e-12)
        interval = bootstrap(np.array(expected))
        found = document["measures"][name]
        assert (found["value"], found["low"], found["high"]) == pytest.approx(
            (interval.mean, interval.low, interval.high)
        )
    assert [pair["name"] for pair in document["pairs"]] == ["p4", "p3", "p2", "p1", "p0"], "worst first"
    assert document["sizes"] == {"24x16": COUNT}


def test_the_table_has_the_worst_pairs_first(calib: Calib) -> None:
    out = well(calib("a", "b", "--worst", "2")).out
    lines = [line.split()[0] for line in out.splitlines() if line.startswith("p")]
    assert lines == ["p4", "p3"]
    assert "PSNR (dB, higher is closer)" in out and "and 3 pairs more" in out
    assert "worst pairs by PSNR" in out
    assert "only 5 pairs" in out


def test_each_pair_is_one_line_whatever_its_name(calib: Calib) -> None:
    for name in "ab":
        Path(name, "p0.png").rename(Path(name, "new\nline \x1b[31m\u2028é👨\u200d👩.png"))
    out = well(calib("a", "b")).out
    assert "\nnew\\nline \\x1b[31m\\u2028é👨\u200d👩  " in out and "\x1b" not in out


def test_a_page_and_a_document_are_written(calib: Calib) -> None:
    assert "page: pairs.html" in well(calib("a", "b", "--html", "pairs.html", "--json", "pairs.json")).err
    page = Path("pairs.html").read_text()
    assert page.count("data:image/png") == 2 * COUNT
    assert "How to make it again" in page and page.index("p4") < page.index("p0")
    assert len(json.loads(Path("pairs.json").read_text())["pairs"]) == COUNT


def test_what_does_not_matter(calib: Calib) -> None:
    """Endings, other files, hidden files, folders, opaque alpha channels, palettes."""
    before = json.loads(well(calib("a", "b", "--json")).out)["pairs"]
    Image.open("b/p0.png").save("b/p0.webp", lossless=True)
    Path("b/p0.png").unlink()
    opaque = Image.open("a/p1.png").convert("RGBA")
    opaque.save("a/p1.png")
    for path in ("a/workflow.json", "a/.DS_Store", "b/notes.txt"):
        Path(path).write_text("{}")
    Path("a/below").mkdir()
    after = json.loads(well(calib("a", "b", "--json")).out)["pairs"]
    assert [p["psnr"] for p in after] == [p["psnr"] for p in before]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_compared_as_they_are_seen(calib: Calib, orientation: int) -> None:
    """Turned as their EXIF says, as a camera's and an editor's are; what the page shows, too."""
    before = json.loads(well(calib("a", "b", "--json")).out)
    exif, image = Image.Exif(), Image.open("b/p0.png")
    exif[TAG] = orientation
    undone = {**{own: own for own in range(1, 9)}, 6: 8, 8: 6}[orientation]
    stored = image if undone == 1 else image.transpose(TURNS[undone])
    stored.save("b/p0.webp", lossless=True, exif=exif)
    Path("b/p0.png").unlink()
    after = json.loads(well(calib("a", "b", "--json", "--html", "page.html")).out)
    assert [pair["psnr"] for pair in after["pairs"]] == [pair["psnr"] for pair in before["pairs"]]
    assert after["sizes"] == before["sizes"]
    (shown, _), (kept, _) = data_address(Path("b/p0.webp")), data_address(Path("a/p0.png"))
    sizes = [Image.open(io.BytesIO(base64.b64decode(own.partition(",")[2]))).size for own in (shown, kept)]
    assert sizes == [image.size] * 2 and shown in Path("page.html").read_text()


def test_sizes_are_those_that_are_seen(calib: Calib) -> None:
    """A picture that is stored upright and turned by its EXIF has another size; damaged EXIF turns nothing."""
    exif = Image.Exif()
    exif[TAG] = 6
    image = Image.open("b/p0.png")
    image.save("b/p0.jpg", exif=exif)
    Path("b/p0.png").unlink()
    assert "a/p0.png and b/p0.jpg: of 24×16 and 16×24 pixels" in is_one_clear_line(calib("a", "b"), status=1)
    image.save("b/p0.jpg", exif=b"Exif\0\0garbage")
    assert json.loads(well(calib("a", "b", "--json")).out)["sizes"] == {"24x16": COUNT}


def test_what_lies_behind_a_cameras_picture_is_not_seen(calib: Calib) -> None:
    """As in JPEGs with a small copy or a map of brightness behind them."""
    images = [Image.fromarray(picture(seed)) for seed in (0, 1)]
    Path("b/p0.png").unlink()
    found = []
    for format_, more in (("JPEG", {}), ("MPO", {"save_all": True, "append_images": images[1:]})):
        images[0].save("b/p0.jpg", format_, **more)
        found.append(json.loads(well(calib("a", "b", "--json")).out)["measures"])
    assert found[0] == found[1]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_picture_cut_anywhere_is_whole_or_refused(folder: Path, ending: str) -> None:
    path = folder / f"x.{ending}"
    Image.fromarray(picture(0)).save(path)
    content, whole = path.read_bytes(), read_picture(path).pixels
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        try:
            assert np.array_equal(read_picture(path).pixels, whole)
        except CalibError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_grey_and_equal_pictures_are_noted(calib: Calib) -> None:
    for name in "ab":
        Image.open("a/p0.png").convert("L").save(f"{name}/p0.png")
    out = well(calib("a", "b")).out
    assert "2 grey pictures: one channel counts as three equal ones" in out
    assert "1 of 5 pairs equal" in out


def sixteen_bits(path: Path, grey: bool = False) -> None:
    """A PNG of 16 bits a channel by hand, as Pillow writes no colours of 16 bits."""
    rows = b"".join(b"\0" + bytes(16 * (2 if grey else 6)) for _ in range(16))
    head = struct.pack(">IIBBBBB", 16, 16, 16, 0 if grey else 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(own)) + name + own + struct.pack(">I", zlib.crc32(name + own)) for name, own in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def animated(path: Path) -> None:
    frames = [Image.fromarray(picture(i)) for i in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def cmyk() -> None:
    Path("a/p0.png").unlink()
    Image.fromarray(picture(0)).convert("CMYK").save("a/p0.jpg")


def transparent() -> None:
    Image.fromarray(np.dstack([picture(0), np.full((16, 24), 128, np.uint8)])).save("a/p0.png")


def emptied(name: str) -> None:
    shutil.rmtree(name)
    Path(name).mkdir()


def truncated() -> None:
    content = Path("b/p3.png").read_bytes()
    Path("b/p3.png").write_bytes(content[: len(content) // 2])


#: A fault, and what the one line about it says.
BAD: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "no folder": (lambda: shutil.rmtree("b"), ("b: cannot be read as a folder of pictures (No such file",)),
    "a file": (lambda: (shutil.rmtree("b"), Path("b").write_text("")), ("b: cannot be read as a folder",)),
    "empty": (lambda: emptied("b"), ("b: no picture in it",)),
    "fewer": (Path("b/p2.png").unlink, ("5 pictures and 4, 4 of one name", "only in a: p2")),
    "no names in common": (
        lambda: [Path(f"b/p{i}.png").rename(f"b/q{i}.png") for i in range(COUNT)],
        ("0 of one name", "only in a: p0, p1, p2 and 2 more; only in b: q0",),
    ),
    "one name twice": (lambda: save(picture(0), Path("a/p0.webp")), ("a/p0.webp: p0.png has the same name",)),
    "other sizes": (lambda: save(picture(0, (32, 16)), Path("b/p1.png")), ("a/p1.png and b/p1.png", "24×16 and 32×16")),
    "small": (lambda: [save(picture(0, (8, 8)), Path(f"{n}/p1.png")) for n in "ab"], ("a/p1.png: of 8×8", "needs 11")),
    "truncated": (truncated, ("b/p3.png: cannot be read as a PNG",)),
    "no picture": (lambda: Path("b/p3.png").write_text("hello"), ("b/p3.png: is no PNG, JPEG or WebP picture",)),
    "no bytes": (lambda: Path("b/p3.png").write_text(""), ("b/p3.png: is empty",)),
    "of another format": (lambda: Image.open("a/p3.png").save("b/p3.png", "GIF"), ("b/p3.png: is no PNG, JPEG",)),
    "animated PNG": (lambda: animated(Path("b/p3.png")), ("b/p3.png: is animated (3 frames)",)),
    "animated GIF": (lambda: animated(Path("b/p9.gif")), ("b/p9.gif: pictures are read as PNG, JPEG or WebP",)),
    "16 bits": (lambda: sixteen_bits(Path("a/p3.png")), ("a/p3.png: has 16 bits a channel; convert it to 8",)),
    "16 bits of grey": (lambda: sixteen_bits(Path("a/p3.png"), True), ("a/p3.png: has 16 bits a channel",)),
    "CMYK": (cmyk, ("a/p0.jpg: is CMYK", "convert it")),
    "a link to nowhere": (lambda: [Path(f"{n}/q.png").symlink_to("gone") for n in "ab"], ("a/q.png: is a link that",)),
    "a pipe": (lambda: [os.mkfifo(f"{n}/q.png") for n in "ab"], ("a/q.png: is no regular file",)),
    "a line break in a name": (lambda: Path("b/new\nline.png").write_text(""), ("only in b: new\\nline;",)),
    "transparent": (transparent, ("a/p0.png: has transparent pixels",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(calib: Calib, case: str) -> None:
    harm, words = BAD[case]
    harm()
    line = is_one_clear_line(calib("a", "b"), status=1)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a",), "required: DIR_B"),
        (("a", "b", "c"), "unrecognized arguments: c"),
        (("a", "b", "--metrics", "psrn"), "--metrics=psrn: no such measure. Did you mean 'psnr'?"),
        (("a", "b", "--metrics", "psnr,psnr"), "--metrics: psnr is named twice"),
        (("a", "b", "--worst", "x"), "'x' is not a number of pairs"),
        (("a", "b", "--html", "a"), "--html=a: is a folder; name a file"),
        (("a", "b", "--json", "a/p0.png/x"), "--json=a/p0.png: cannot be written (Not a directory)"),
        (("--json",), "required: DIR_A, DIR_B"),
        (("run", "plan=x"), "run: comes first, one at a time"),
        (("report", "plan=x"), "report: neither a flag nor a setting"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(calib: Calib, arguments: tuple[str, ...], words: str) -> None:
    assert words in is_one_clear_line(calib(*arguments))


@pytest.mark.parametrize(
    ("words", "folders"),
    [
        ("", False),
        ("plan=run", False),
        ("plan=run a", False),
        ("-m plan=x,y", False),
        ("--config-dir a plan=run", False),
        ("~evaluation", False),
        ("report", False),
        ("a", True),
        ("a b", True),
        ("missing b", True),
        ("missing missing", True),
        ("plan=x a", True),
        ("plan=x plan=y", True),
        ("plan=x report=none", False),
        ("--worst 3 a b", True),
        ("--json=x a b", True),
    ],
)
def test_folders_are_told_from_settings(folder: Path, words: str, folders: bool) -> None:
    """plan=x and plan=y are folders here, as the jobs of a sweep have such names; plan=run is none."""
    for name in ("a", "b", "plan=x", "plan=y"):
        Path(name).mkdir()
    assert names_folders(words.split()) == folders


def test_one_picture_has_no_interval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        Path(name).mkdir()
        save(noisy(picture(0), ord(name)), Path(name, "x.png"))
    out = well(run_here(("evaluate", "a", "b"), capsys)).out
    assert "only 1 pair: with fewer than 8 the intervals are too narrow" in out


def test_help_is_that_of_what_is_asked(calib: Calib) -> None:
    assert "usage: calib evaluate DIR_A DIR_B" in well(calib("a", "b", "--help")).out
    stage = well(calib("--help")).out
    assert "usage: calib evaluate [key=value" in stage and "calib evaluate DIR_A DIR_B" in stage


def test_memory_does_not_grow_with_the_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 times as many, half a megabyte of floats each, less than four more would take; few are floats at once."""
    monkeypatch.setattr("calib.evaluation.folders.cores", lambda: 2)
    peaks, floats = [], 160 * 140 * 3 * 8
    for count in (16, 256):
        for name in ("a", "b"):
            (folder / f"{name}{count}").mkdir()
            save(noisy(picture(0, (160, 140)), ord(name)), folder / f"{name}{count}" / "0000.png")
            for number in range(1, count):
                (folder / f"{name}{count}" / f"{number:04d}.png").hardlink_to(folder / f"{name}{count}" / "0000.png")
        tracemalloc.start()
        compare_folders(folder / f"a{count}", folder / f"b{count}", ["psnr", "ssim"])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 4 * floats and peaks[0] < 2 * BATCH * floats
