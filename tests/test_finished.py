"""Layers that gptq has finished are kept: interrupted, it goes on from them to the same bits."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.models.packed import Packed
from calib.quantization import finished, gptq
from calib.quantization.quantizer import Quantized

import pytest
from quantizing import States, same, tiny_states, work_on


@pytest.fixture(scope="module")
def sd3() -> States:
    return tiny_states("sd3")


def made_by(states: States, scratch: Path | None, stop: int | None = None, **parameters: Any) -> tuple[Quantized, int]:
    """What gptq makes, and in how many replays; it is interrupted at that of number ``stop``."""
    count, own = 0, gptq.gather_hessians

    def gather(*given: Any) -> Any:
        nonlocal count
        if count == stop:
            raise KeyboardInterrupt
        count += 1
        return own(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq, "gather_hessians", gather)
        return gptq.quantize(replace(work_on(states), scratch=scratch), **parameters), count


@pytest.fixture(scope="module")
def whole(sd3: States) -> tuple[Quantized, int]:
    return made_by(sd3, None)


def alike(one: Mapping[str, Packed], other: Mapping[str, Packed]) -> bool:
    return list(one) == list(other) and all(same(one[n], other[n]) for n in one)


@pytest.fixture
def kept(sd3: States, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files of three replays, after which it was interrupted."""
    monkeypatch.setattr(finished, "EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        made_by(sd3, tmp_path, stop=3)
    return sorted(tmp_path.glob("layers/*/*.safetensors"))


@pytest.mark.parametrize(("damaged", "left"), [(None, 3), (2, 2), (0, 0)])
def test_it_goes_on(
    damaged: int | None, left: int, kept: list[Path], sd3: States, whole: tuple[Quantized, int], tmp_path: Path
) -> None:
    """From the last file before a damaged one; a second time nothing is left to do; notes are of all layers."""
    assert [path.name for path in kept] == ["0000.safetensors", "0001.safetensors", "0002.safetensors"]
    if damaged is not None:
        kept[damaged].write_bytes(kept[damaged].read_bytes()[:-100])
    for replays in (whole[1] - left, 0):
        again, count = made_by(sd3, tmp_path)
        assert count == replays
        assert alike(again.layers, whole[0].layers) and again.notes == whole[0].notes


def test_files_behind_a_damaged_one_go(kept: list[Path], sd3: States, tmp_path: Path) -> None:
    """They are parts of work that is done again, and may be cut elsewhere then."""
    kept[1].write_bytes(kept[1].read_bytes()[:-100])
    with pytest.raises(KeyboardInterrupt):
        made_by(sd3, tmp_path, stop=0)
    assert [path.exists() for path in kept] == [True, False, False]


@pytest.mark.parametrize("parameters", [{"damping": 0.5}, {"act_order": False}, {"memory_gb": 1.0}, {"rotation": 16}])
def test_other_parameters_begin_anew(parameters: dict[str, Any], kept: list[Path], sd3: States, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        made_by(sd3, tmp_path, stop=1, **parameters)
    (path,) = set(tmp_path.glob("layers/*/*.safetensors")) - set(kept)
    assert path.name == "0000.safetensors" and path.parent != kept[0].parent


def test_short_work_is_not_written(sd3: States, tmp_path: Path) -> None:
    made_by(sd3, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_is_done_is_forgotten(kept: list[Path], tmp_path: Path) -> None:
    finished.forget(tmp_path)
    assert len(kept) == 3 and not any(path.exists() for path in kept)
