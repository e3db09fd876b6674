"""The command that makes a product of a run directory anew, as it was made: for errors that name it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calib.runs.record import Configuration, read_configuration
from calib.stages import Stage

#: Groups that decide what a stage makes.
_GROUPS: Mapping[Stage, tuple[str, ...]] = {
    Stage.COLLECT: ("timestep_schedule", "subset", "taps", "storage"),
    Stage.ANALYZE: ("analysis", "ranges"),
    Stage.QUANTIZE: ("quantizer",),
    Stage.EVALUATE: ("evaluation",),
}


def renewing(stage: Stage, home: Path, *given: str) -> str:
    """``calib STAGE … hydra.run.dir=HOME`` with the options that the directory records of it."""
    found = read_configuration(home, [])
    words = ["calib", stage.value, *given, f"hydra.run.dir={home}"]
    if "model" in found.options:
        words.append(f"model={found.options['model']}")
    sampler = found.values.get("sampler")
    if isinstance(sampler, dict) and "num_steps" in sampler:
        words.append(f"sampler.num_steps={sampler['num_steps']}")
    for group in _GROUPS[stage]:
        if group in found.options:
            words.append(f"{group}={found.options[group]}")
        words += _parameters(group, found)
    return shlex.join(words)


def _parameters(group: str, found: Configuration) -> list[str]:
    """Overrides of a group's parameters: those that the command line set, or all that came with an earlier stage's."""
    values = found.values.get(group)
    named = values if isinstance(values, dict) else {}
    wanted = {key: value for key, value in named.items() if group in found.carried or f"{group}.{key}" in found.asked}
    return [f"{group}.{key}={_text(value)}" for key, value in wanted.items() if _is_plain(value) and key[:1] != "_"]


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) or (isinstance(value, list) and all(map(_is_plain, value)))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
