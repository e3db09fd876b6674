"""Report a comparison of two folders of pictures: as text for people, and as JSON."""

from typing import Any

from calib.base.encoding import aligned, printable
from calib.base.progress import counted
from calib.evaluation.agreement import cut_lines, score_lines
from calib.evaluation.folders import FolderComparison
from calib.evaluation.metrics import FEW_PROMPTS, LEVEL, MOST_PSNR
from calib.evaluation.titles import TITLES

import numpy as np


def folders_json(found: FolderComparison) -> dict[str, Any]:
    """One JSON-able document with every value, the worst pair first; null is the PSNR of equal pictures."""
    names = list(found.pairs)
    pairs = [
        {
            "name": names[place],
            "files": [str(path) for path in found.pairs[names[place]]],
            **{name: float(own[place]) if np.isfinite(own[place]) else None for name, own in found.values.items()},
        }
        for place in found.order
    ]
    return {
        "folders": [str(folder) for folder in found.folders],
        "pairs": pairs,
        "measures": {name: _figures(found, name) for name in (*found.values, *found.sets)},
        "sizes": {f"{width}x{height}": count for (width, height), count in found.sizes.items()},
        "notes": notes(found),
    }


def _figures(found: FolderComparison, name: str) -> dict[str, Any]:
    about = {"title": TITLES[name].title, "better": TITLES[name].better}
    if name in found.sets:
        own = found.sets[name]
        return {**about, "value": own.value, "low": own.low, "high": own.high, **own.further}
    interval = found.intervals[name]
    return {**about, "value": interval.mean, "low": interval.low, "high": interval.high}


def notes(found: FolderComparison) -> list[str]:
    """What a reader of the figures must know."""
    lines = []
    if "psnr" in found.values and (equal := int(np.isinf(found.values["psnr"]).sum())):
        of = counted(len(found.pairs), "pair")
        lines.append(f"{equal} of {of} equal, which count as {MOST_PSNR:.1f} dB in the mean")
    lines += [*score_lines(found.values, str(found.folders[0])), *cut_lines(found.cut, len(found.pairs))]
    if found.grey:
        lines.append(f"{counted(found.grey, 'grey picture')}: one channel counts as three equal ones")
    if len(found.sizes) > 1:
        shown = sorted(found.sizes, key=lambda size: -found.sizes[size])[:3]
        more = ", …" if len(found.sizes) > 3 else ""
        listed = ", ".join(f"{found.sizes[size]} of {size[0]}×{size[1]}" for size in shown)
        lines.append(f"pairs have {len(found.sizes)} sizes ({listed}{more}), each of which counts alike")
    if len(found.pairs) < FEW_PROMPTS:
        few = counted(len(found.pairs), "pair")
        lines.append(f"only {few}: with fewer than {FEW_PROMPTS} the intervals are too narrow to be trusted")
    return [*lines, *(f"{name}: {note}" for name, own in found.sets.items() for note in own.notes)]


def folders_text(found: FolderComparison, most: int) -> str:
    """The report for people: a table of measures, and the ``most`` worst pairs."""
    one, other = found.folders
    head = printable(f"{one} and {other}: {counted(len(found.pairs), 'pair')}")
    lines = [head, *aligned(measure_rows(found), "<>>")]
    if found.values and most:
        heads = [worst_pairs(found), *(TITLES[name].title for name in found.values)]
        names, rows = list(found.pairs), []
        for place in found.order[:most]:
            rows.append([names[place], *(shown(name, float(own[place])) for name, own in found.values.items())])
        lines += ["", *aligned([heads, *rows], "<" + ">" * len(found.values))]
        left = len(found.pairs) - len(rows)
        lines += [f"and {counted(left, 'pair')} more; --json has all"] if left > 0 else []
    return "\n".join([*lines, *(f"note: {note}" for note in notes(found))]) + "\n"


def measure_rows(found: FolderComparison) -> list[list[str]]:
    """Rows of the table of measures, its head first: name, value, interval, remark."""
    rows = [["", "value" if found.sets else "mean", f"{LEVEL:.0%} interval", ""]]
    for name, interval in found.intervals.items():
        own = TITLES[name]
        low, mean, high = (own.form.format(value) for value in (interval.low, interval.mean, interval.high))
        rows.append([own.label, mean, f"[{low}, {high}]", ""])
    for name, distance in found.sets.items():
        own = TITLES[name]
        low, value, high = (own.form.format(v) for v in (distance.low, distance.value, distance.high))
        rows.append([own.label, value, f"[{low}, {high}]", distance.text])
    return rows


def worst_pairs(found: FolderComparison) -> str:
    """A heading of the pairs in their order, which says by what the worst are first; of none, 'pairs'."""
    return "pairs" if found.worst_by is None else f"worst pairs by {TITLES[found.worst_by].title}"


def shown(name: str, value: float) -> str:
    """A value of a measure for people; 'equal' for an infinite one."""
    return TITLES[name].form.format(value) if np.isfinite(value) else "equal"
