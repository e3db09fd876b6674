"""FID, KID, precision and recall: torch-fidelity's own figures, where it is installed; a line each where it cannot be.

Its weights are stood in for by random ones in its layout.
"""

import html
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any

from calib.base.files import read_json
from calib.base.layout import DETAILS, FULL_PICTURES, METRICS, PAGE, QUANTIZED_PICTURES
from calib.evaluation.features import inception

import numpy as np
import pytest
from helpers import is_one_clear_line, run_here, run_in, well
from PIL import Image
from test_folders import noisy, picture, save

NAMES = ("fid", "kid", "precision", "recall")
COUNT = 12

installed = pytest.mark.skipif(util.find_spec("torch_fidelity") is None, reason="torch-fidelity is not installed")
absent = pytest.mark.skipif(util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")


@pytest.fixture
def pictures(folder: Path) -> Path:
    """A folder with folders a and b of a dozen pictures each, in pairs, b's noisy; it is the current one."""
    for name in "ab":
        Path(name).mkdir()
    for number in range(COUNT):
        save(picture(number), Path(f"a/p{number:02d}.png"))
        save(noisy(picture(number), number, 30), Path(f"b/p{number:02d}.png"))
    return folder


@absent
@pytest.mark.parametrize("name", NAMES)
def test_what_to_install_is_one_line(pictures: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    settings = (f"evaluation.metrics=[{name}]", "evaluation=distribution")
    for arguments in (("evaluate", "a", "b", "--metrics", name), *((own, "hydra.run.dir=run") for own in settings)):
        line = is_one_clear_line(run_here(arguments, capsys))
        assert "pip install torch-fidelity==0.4.0, or uv sync --group fid" in line and "fd_effnet do without" in line
    assert not Path("run").exists() and run_here(("evaluate", "a", "b"), capsys).status == 0


@absent
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            "raise RuntimeError('operator torchvision::nms does not exist')",
            "cannot be imported (operator torchvision::nms does not exist); install torch",
        ),
        ("__version__ = '0.3.0'", "torch-fidelity 0.3.0 is installed, and figures are by functions of 0.4.0: pip"),
    ],
)
def test_another_torch_fidelity_is_one_line(pictures: Path, content: str, words: str) -> None:
    """One with torch and torchvision of different builds, and one of another version."""
    package = pictures / "broken" / "torch_fidelity"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(content)
    command = [sys.executable, "-m", "calib", "evaluate", "a", "b", "--metrics", "kid"]
    paths = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1, found.stderr
    assert words in found.stderr


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights in torch-fidelity's layout."""
    torch = pytest.importorskip("torch")
    from torch_fidelity import feature_extractor_inceptionv3 as module

    with pytest.MonkeyPatch.context() as patch:  # of a network without weights, for its layout
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        layout = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    random = torch.Generator().manual_seed(0)
    made = {}
    for name, array in layout.items():
        made[name] = array.clone()
        if name.endswith("running_var"):
            made[name] = 0.5 + torch.rand(array.shape, generator=random)
        elif array.ndim == 4:
            made[name] = torch.randn(array.shape, generator=random) * (2 / array[0].numel()) ** 0.5
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(made, path)
    return path


def others(weights: Path, path: Path) -> None:
    """Write other weights of the same layout to ``path``."""
    import torch

    torch.save({name: own * 0.9 if own.ndim == 4 else own for name, own in torch.load(weights).items()}, path)


DIRECTLY = """
import json, sys, torch_fidelity
one, other, weights, size = sys.argv[1:]
found = torch_fidelity.calculate_metrics(
    input1=other, input2=one, fid=True, kid=True, prc=True, feature_extractor="inception-v3-compat",
    feature_extractor_weights_path=weights, kid_subset_size=int(size), cuda=False, cache=False, verbose=False,
)
print(json.dumps(found))
"""


def directly(one: Path, other: Path, weights: Path) -> dict[str, float]:
    """What torch-fidelity itself computes of two folders, in a process of its own, without calib."""
    size = len(list(one.iterdir())) // 2
    command = [sys.executable, "-c", DIRECTLY, str(one), str(other), str(weights), str(size)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


@installed
def test_figures_are_torch_fidelitys_to_the_last_digit(
    pictures: Path, weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another number of pictures at once, pictures of which some are known already, and no more of them again."""
    monkeypatch.setattr(inception, "AT_ONCE", 5)
    kept = ("--inception", str(weights), "--json")
    well(run_here(("evaluate", "a", "a", "--metrics", "recall", *kept), capsys))
    found = json.loads(well(run_here(("evaluate", "a", "b", "--metrics", ",".join(NAMES), *kept), capsys)).out)
    own, theirs = found["measures"], directly(pictures / "a", pictures / "b", weights)
    assert own["fid"]["value"] == theirs["frechet_inception_distance"] > 0
    assert own["kid"]["value"] == theirs["kernel_inception_distance_mean"]
    assert own["kid"]["std"] == theirs["kernel_inception_distance_std"] > 0
    assert [own[name]["value"] for name in ("precision", "recall")] == [theirs["precision"], theirs["recall"]]
    for name in NAMES:
        assert own[name]["low"] < own[name]["high"]
    assert any("fewer than 10,000" in note for note in found["notes"]) and own["fid"]["unbiased"] != own["fid"]["value"]
    entries = [path for path in Path("calibration_cache/features").rglob("*") if path.is_file()]
    assert len(entries) == 2 * COUNT


@installed
def test_a_run_has_the_figures_of_its_pictures(
    tiny_run: Path, weights: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("evaluation.num_images=8", "evaluation.steps=1", "sampler.num_steps=2", "sampler.batch_size=4")
    asked = (
        f"plan={tiny_run}",
        *sizes,
        "evaluation.metrics=[psnr,ssim,kid,precision]",
        f"evaluation.inception={weights}",
    )
    well(run_in(folder, "evaluate", *asked, "hydra.run.dir=run"))
    theirs, own = (
        directly(Path("run", FULL_PICTURES), Path("run", QUANTIZED_PICTURES), weights),
        read_json(Path("run", METRICS)),
    )
    assert own["kid"] == theirs["kernel_inception_distance_mean"] and own["kid_subset_size"] == 4
    assert own["precision"] == theirs["precision"] and own["precision_low"] < 1
    page = Path("run", PAGE).read_text()
    notes = read_json(Path("run", DETAILS))["notes"]
    assert [note.partition(":")[0] for note in notes] == ["kid", "precision"]
    assert all(html.escape(note) in page for note in notes)
    again = ("evaluate", *asked, "hydra.run.dir=run", f"evaluation.inception={folder / 'w.pth'}", "report=none")
    Path("w.pth").write_bytes(weights.read_bytes())
    well(run_here(again, capsys))
    assert read_json(Path("run", METRICS))["kid"] == own["kid"]
    assert "Already complete" in well(run_here(again, capsys)).out
    others(weights, Path("w.pth"))
    assert "Already complete" not in well(run_here(again, capsys)).out
    assert read_json(Path("run", METRICS))["kid"] != own["kid"]


@installed
def test_pictures_of_different_sizes(folder: Path, weights: Path) -> None:
    """As a reference has them: each gives what it gives by itself."""
    given = [picture(0), picture(1, (40, 30)), picture(2), picture(3, (40, 30))]
    extractor, alone = (inception.InceptionFeatures(folder / cache, weights, "key") for cache in ("cache", "none"))
    expected = np.concatenate([alone.vectors([own]) for own in given])
    np.testing.assert_array_equal(extractor.vectors(given), expected)
    np.testing.assert_array_equal(extractor.vectors(given[::-1]), expected[::-1])


class Harmful:
    def __reduce__(self) -> Any:
        return (Path("harmed").touch, ())


def of_another_network(_: bytes) -> None:
    import torch

    torch.save({"layer.weight": torch.zeros(3)}, "w.pth")


def with_code(_: bytes) -> None:
    import torch

    torch.save({"layer.weight": Harmful()}, "w.pth")


def an_array(_: bytes) -> None:
    import torch

    torch.save(torch.zeros(3), "w.pth")


#: Files that are no weights of Inception, and what the line about each says.
BAD: dict[str, tuple[Callable[[bytes], object], str]] = {
    "missing": (lambda _: None, "cannot be read as weights of Inception (No such file"),
    "a folder": (lambda _: Path("w.pth").mkdir(), "cannot be read as weights of Inception (Is a directory"),
    "a pipe": (lambda _: os.mkfifo("w.pth"), "cannot be read as weights of Inception (Not a regular file"),
    "text": (lambda _: Path("w.pth").write_text("hello"), "is no file of weights"),
    "empty": (lambda _: Path("w.pth").write_text(""), "is no file of weights"),
    "truncated": (lambda whole: Path("w.pth").write_bytes(whole[: len(whole) // 2]), "cannot be read as weights"),
    "a picture": (lambda _: Image.new("RGB", (9, 9)).save("w.pth", "PNG"), "is no file of weights"),
    "a pickle": (lambda _: Path("w.pth").write_bytes(pickle.dumps(Harmful())), "is no file of weights"),
    "with code": (with_code, "holds more than arrays, which is not read"),
    "another network's": (of_another_network, "has not the arrays of torch-fidelity's Inception network"),
    "an array": (an_array, "has not the arrays of torch-fidelity's Inception network"),
}


@installed
@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_something_else_is_one_line(
    pictures: Path, weights: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    make, words = BAD[case]
    make(weights.read_bytes())
    settings = ("evaluation.metrics=[kid]", "evaluation.inception=w.pth", "hydra.run.dir=run")
    of_folders = ("evaluate", "a", "b", "--metrics", "kid", "--inception", "w.pth")
    for key, arguments in {"--inception": of_folders, "evaluation.inception": settings}.items():
        line = is_one_clear_line(run_here(arguments, capsys))
        assert line.startswith(f"{key}=w.pth: ") and words in line, line
    assert not Path("run").exists() and not Path("harmed").exists(), "nothing in it is executed"


@pytest.fixture
def no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder in which torch keeps what it downloads, where nothing can be."""
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    yield folder / "torch" / "hub" / "checkpoints"


@installed
def test_weights_that_cannot_be_downloaded(
    no_network: Path, pictures: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line that says what to do; those that were downloaded before are used; damaged ones are named."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    command = ("evaluate", "a", "b", "--metrics", "recall")
    outcome = run_here(command, capsys)
    said, line = outcome.err.splitlines()
    assert outcome.status == 1 and said.startswith("Downloading: "), "by torch"
    assert "cannot download" in line and URL_INCEPTION_V3 in line and "--inception=FILE" in line
    no_network.mkdir(parents=True, exist_ok=True)
    kept = no_network / URL_INCEPTION_V3.rpartition("/")[2]
    kept.write_bytes(weights.read_bytes()[:1000])
    assert f"{kept}: cannot be read as weights" in is_one_clear_line(run_here(command, capsys), status=1)
    kept.write_bytes(weights.read_bytes())
    assert "recall" in well(run_here(command, capsys)).out
