"""How well weights survive rounding: measured once for a model, and again where the file of it is spoiled."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from calib.activations.weights import cached_weight_sqnr, weight_sqnr
from calib.base.affine import WEIGHT_BITS

import mlx.core as mx
import pytest
from mlx import nn

NAMES = ["a", "zero", "narrow", "block"]


@pytest.fixture
def layers() -> dict[str, nn.Module]:
    """An ordinary layer, one of zeros, and one that is not rounded in groups of 64."""
    mx.random.seed(0)
    found: dict[str, nn.Module] = {"a": nn.Linear(64, 32), "zero": nn.Linear(64, 32), "narrow": nn.Linear(48, 32)}
    found["zero"].weight = mx.zeros((32, 64))
    return found


def never() -> Mapping[str, nn.Module]:
    raise AssertionError("measured again")


def test_measured_once(layers: dict[str, nn.Module], tmp_path: Path) -> None:
    measured = cached_weight_sqnr(tmp_path, "0123", NAMES, lambda: layers)
    assert measured == {"a": weight_sqnr(layers["a"]), "zero": dict.fromkeys(WEIGHT_BITS, math.inf)}
    assert cached_weight_sqnr(tmp_path, "0123", NAMES, never) == measured
    assert cached_weight_sqnr(tmp_path, "0123", ["zero", "narrow"], never) == {"zero": measured["zero"]}
    assert cached_weight_sqnr(tmp_path, "4567", ["a"], lambda: layers) == {"a": measured["a"]}, "of another model"


def test_further_layers(layers: dict[str, nn.Module], tmp_path: Path) -> None:
    cached_weight_sqnr(tmp_path, "0123", ["a"], lambda: layers)
    (half := tmp_path / "weights" / ".0123.json.x.tmp").write_text("of a killed process")
    cached_weight_sqnr(tmp_path, "0123", ["zero"], lambda: {"zero": layers["zero"]})
    assert not half.exists()
    assert set(cached_weight_sqnr(tmp_path, "0123", NAMES[:2], never)) == {"a", "zero"}


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"a": 3}', '{"a": []}', '{"a": {"2": "x"}}', '{"a": {"2": [1]}}', '{"b": null}', "half"],
)
def test_spoiled_files(layers: dict[str, nn.Module], tmp_path: Path, content: str) -> None:
    expected = cached_weight_sqnr(tmp_path, "0123", NAMES, lambda: layers)
    (path,) = tmp_path.rglob("*.json")
    sound = path.read_text()
    if content.startswith('{"a": {'):
        bits = {str(b): None for b in WEIGHT_BITS} | json.loads(content)["a"]
        content = json.dumps(json.loads(sound) | {"a": bits})
    path.write_text(sound[: len(sound) // 2] if content == "half" else content)
    assert cached_weight_sqnr(tmp_path, "0123", NAMES, lambda: layers) == expected
    assert json.loads(path.read_text()) == json.loads(sound)
