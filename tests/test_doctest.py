"""The examples in docstrings run."""

import doctest
from pathlib import Path

import calib.quantization


def test_the_way_from_statistics_to_a_picture(tiny_run: Path) -> None:
    outcome = doctest.testmod(calib.quantization, extraglobs={"run": tiny_run})
    assert outcome.attempted > 10
    assert outcome.failed == 0
