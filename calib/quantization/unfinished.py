"""A mark for trainings that a run has begun: none goes on, after an interruption, by other parameters unnoticed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError, ConfigError
from calib.base.files import read_json, short_hash, write_json
from calib.base.locks import locked
from calib.base.progress import say
from calib.quantization.quantizer import QuantizerInput


@contextmanager
def unfinished(work: QuantizerInput, place: Path | None, parameters: Mapping[str, Any]) -> Iterator[None]:
    """Train in the context, by ``parameters``, what is kept at ``place``; another process with the same waits.

    The mark lies in ``work.scratch``, one for each run. It stays where the context is left by an interruption.

    Raises:
        ConfigError: the run's last training was interrupted, and had other parameters.
    """
    if work.scratch is None or place is None:
        yield
        return
    mark = work.scratch / f"{short_hash(work.owner, digits=16)}.unfinished.json"
    if work.owner:
        _check(mark, parameters)
        write_json(mark, dict(parameters))
    with locked(place.with_suffix(".lock"), lambda: say(f"waiting for the process that trains the same ({place})")):
        try:
            yield
        except CalibError:
            mark.unlink(missing_ok=True)  # it failed by its parameters
            raise
    mark.unlink(missing_ok=True)


def _check(mark: Path, parameters: Mapping[str, Any]) -> None:
    if not mark.exists():
        return
    try:
        before = read_json(mark)
    except CalibError:  # damaged: nothing goes on by it
        return
    for key, value in parameters.items():
        if isinstance(before, dict) and key in before and before[key] != value:
            was = f"the training that was interrupted in this run has {before[key]}"
            allowed = f"{was}: go on with that, choose another hydra.run.dir, or remove {mark} to begin anew"
            raise ConfigError.bad_value(f"quantizer.{key}", value, allowed)
