"""The examples in docstrings run."""

import doctest
from pathlib import Path

import calib.quantization as documented

import pytest


@pytest.mark.parametrize("module", [documented])
def test_the_example_runs(module: object, tiny_run: Path) -> None:
    outcome = doctest.testmod(module, extraglobs={"run": tiny_run}, verbose=False)  # type: ignore[arg-type]
    assert outcome.attempted > 10
    assert outcome.failed == 0
