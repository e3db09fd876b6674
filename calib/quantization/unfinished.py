"""A mark for the training that a run has begun: none goes on, after an interruption, by other parameters unnoticed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError, ConfigError
from calib.base.files import read_json, write_json
from calib.quantization.quantizer import QuantizerInput

#: The mark, in the run directory.
MARK = ".training.json"
#: What may change where memory was too little.
RESOURCES = ("memory_gb", "batch_size")


@contextmanager
def unfinished(work: QuantizerInput, method: str, parameters: Mapping[str, Any]) -> Iterator[None]:
    """Train in the context by ``method``; the mark stays where that is left by an interruption.

    Raises:
        ConfigError: a training of this run by the same method was interrupted, and had other parameters.
    """
    if work.home is None:
        yield
        return
    mark, own = work.home / MARK, {"method": method, **parameters}
    _check(mark, own)
    write_json(mark, own)
    try:
        yield
    except CalibError:
        done(work.home)  # it failed by its parameters
        raise
    done(work.home)


def done(home: Path) -> None:
    """Take away the mark of a run's training."""
    (home / MARK).unlink(missing_ok=True)


def _check(mark: Path, own: Mapping[str, Any]) -> None:
    before: Any = None
    with suppress(CalibError, OSError):  # missing or damaged
        before = read_json(mark)
    if not isinstance(before, dict) or before.get("method") != own["method"]:
        return
    for key, value in own.items():
        if key not in RESOURCES and before.get(key, value) != value:
            was = f"the training that was interrupted in this run has {before[key]}"
            allowed = f"{was}: go on with that, or remove {mark} to begin anew with this"
            raise ConfigError.bad_value(f"quantizer.{key}", value, allowed)
