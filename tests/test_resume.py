"""Forwards that begin in the middle: after any block, with what it gave before, they are the whole."""

from typing import Any

from calib.activations.taps import TapSelection, tap_points, tapped
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import EACH_OF_MFLUX, STRUCTURES, tiny_model
from watching import keep


class Begun:
    """Forwards of two rows through one transformer, whole or begun after a block."""

    def __init__(self, architecture: MMDiTArchitecture, *arguments: Any):
        self.architecture, self._arguments = architecture, arguments
        self.blocks = len(architecture.blocks())

    def forward(self, block: int = -1, output: Any = None) -> np.ndarray:
        if output is None:
            return np.array(self.architecture.velocity(*self._arguments))
        return np.array(self.architecture.velocity_after(block, output, *self._arguments))

    def kept(self, block: int, after: int = -1, output: Any = None) -> Any:
        """What ``block`` gives in a forward begun after an earlier one."""
        found: list[Any] = []
        with self.architecture.keeping(block, found.append):
            self.forward(after, output)
        (kept,) = found
        return kept

    def modules(self) -> list[int]:
        return [id(module) for module in self.architecture.module.modules()]


@pytest.fixture(scope="module", params=[*STRUCTURES, *EACH_OF_MFLUX])
def begun(request: pytest.FixtureRequest, model: DiffusionModel) -> Begun:
    tiny = tiny_model(model, request.param)
    text = tiny.encode(["red apple", "rocket"], 0)
    x, timestep = mx.array(np.random.RandomState(0).randn(2, *tiny.latent_shape).astype(np.float32)), mx.array(400.0)
    mx.eval(timestep)
    return Begun(tiny.architecture, x, text, timestep)


def test_forwards_from_any_block(begun: Begun) -> None:
    plain, modules = begun.forward(), begun.modules()
    for block in range(begun.blocks):
        assert np.array_equal(begun.forward(block, begun.kept(block)), plain), block
    assert begun.modules() == modules
    assert np.array_equal(begun.forward(), plain)


def test_outputs_of_later_blocks(begun: Begun) -> None:
    first = begun.kept(0)
    for block in range(1, begun.blocks):
        expected, found = begun.kept(block), begun.kept(block, 0, first)
        pairs = [(found, expected)] if isinstance(found, mx.array) else list(zip(found, expected, strict=True))
        for own, other in pairs:
            assert (own is None) == (other is None), "the last multimodal block of SD3 has no text stream"
            assert own is None or mx.array_equal(own, other), block


def test_what_lies_before_is_not_run(begun: Begun) -> None:
    points = tap_points(begun.architecture, TapSelection())
    place = {point.name: begun.architecture.block_of(point.name) for point in points}
    for block in range(begun.blocks):
        output = begun.kept(block)
        seen: dict[str, mx.array] = {}
        with tapped(begun.architecture, points, keep(seen)):
            begun.forward(block, output)
        # An MMDiT's embedders and modulations come ahead of all blocks.
        first = {name for name, own in place.items() if own is None or name.endswith(".adaln")}
        ahead = first if isinstance(begun.architecture, MMDiTArchitecture) else set()
        assert set(seen) == ahead | {name for name, own in place.items() if own is not None and own > block}


def test_blocks_are_put_back(begun: Begun) -> None:
    modules, output = begun.modules(), begun.kept(1)

    def fail(_: Any) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), begun.architecture.keeping(begun.blocks - 1, fail):
        begun.forward(1, output)
    assert begun.modules() == modules
