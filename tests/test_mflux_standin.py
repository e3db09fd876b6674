"""A stand-in of mflux's, in a module of its own: in that of its families mflux is told other sizes."""

from pathlib import Path

import pytest

pytest.importorskip("mflux", reason="mflux is not installed: uv sync --group mflux")

from calib.models.mflux.flux1 import schnell
from calib.models.model import weights

import make_standin_checkpoint as standin
import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig
from mflux.models.flux.variants.txt2img.flux import Flux1


@pytest.mark.slow
def test_mflux_itself_loads_a_stand_in(tmp_path: Path) -> None:
    """Of full width and fewer blocks, which it counts; all other sizes are those in its code."""
    standin.write_mflux_standin(tmp_path, "flux1_schnell", (1, 1), None)
    (folder,) = tmp_path.glob("*/snapshots/*")
    made = Flux1(model_path=str(folder), model_config=ModelConfig.schnell())
    model = schnell.load("flux1_schnell", "nowhere/nothing", str(folder), image_size=(64, 64))
    found, expected = weights(made.transformer), weights(model.transformer)
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[path], expected[path]).item() for path in expected)
