"""Scores of an evaluation by category of its prompts: mean and interval of each measure of pairs, the worst first."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from calib.base.encoding import aligned
from calib.base.progress import counted
from calib.evaluation.measures import ordering, worst_first
from calib.evaluation.metrics import FEW_PROMPTS, LEVEL, Fidelity, Interval, bootstrap_columns
from calib.evaluation.report import cell
from calib.evaluation.titles import TITLES

import numpy as np

#: Stands for prompts whose cell is empty.
NO_NAME = "(none)"
#: Prompts that the text names, the worst ones.
WORST = 5


@dataclass(frozen=True)
class Categories:
    """What a column of the file of prompts has for each prompt of an evaluation, and what came out.

    Attributes:
        by: the column's name.
        names: (prompts,) what is in it.
        worst_by: the measure by which the worst are first.
    """

    by: str
    names: Sequence[str]
    worst_by: str
    found: Fidelity

    @property
    def order(self) -> list[int]:
        """Places of the prompts, the worst first."""
        return worst_first(self.found.values()[self.worst_by], self.worst_by)

    @property
    def pictures(self) -> dict[str, int]:
        """Number of pictures of each category."""
        return {name: list(self.names).count(name) for name in dict.fromkeys(self.names)}

    def intervals(self) -> dict[str, dict[str, Interval]]:
        """Mean and 95% interval of each measure by category, the worst first."""
        values = self.found.values()
        columns = np.stack(list(values.values()), axis=1)
        found = {}
        for name in self.pictures:
            own = columns[[i for i, other in enumerate(self.names) if other == name]]
            found[name] = dict(zip(values, bootstrap_columns(own), strict=True))
        means = np.array([own[self.worst_by].mean for own in found.values()])
        names = list(found)
        return {names[place]: found[names[place]] for place in worst_first(means, self.worst_by)}

    def summary(self) -> dict[str, float]:
        """Flat numbers for ``metrics.json``: ``psnr/Animals``, ``psnr_low/Animals``, …, ``pictures/Animals``."""
        found: dict[str, float] = {}
        for name, intervals in self.intervals().items():
            for measure, own in intervals.items():
                found |= {f"{measure}/{name}": own.mean, f"{measure}_low/{name}": own.low}
                found[f"{measure}_high/{name}"] = own.high
            found[f"pictures/{name}"] = self.pictures[name]
        return found

    def to_json(self) -> dict[str, object]:
        """For ``evaluation.json``, which has the rest."""
        return {"by": self.by, "names": list(self.names), "worst_by": self.worst_by}

    @classmethod
    def from_json(cls, document: Mapping[str, object], found: Fidelity) -> "Categories":
        """The inverse of :meth:`to_json`; raises KeyError, TypeError or ValueError for a damaged document."""
        names, worst_by = document["names"], str(document["worst_by"])
        if not isinstance(names, list) or len(names) != found.prompts or worst_by not in found.values():
            raise ValueError("categories of other prompts")
        return cls(str(document["by"]), [str(name) for name in names], worst_by, found)


def categories_of(by: str, of_list: Sequence[str], metrics: Iterable[str], found: Fidelity) -> Categories:
    """Categories of an evaluation's prompts, which are the last of a list; ``of_list`` has those of the whole list.

    The worst are those by the first measure of pairs that was asked for, of a score those by its change.
    """
    last = of_list[::-1]
    names = [last[i % len(last)] or NO_NAME for i in range(found.prompts)]
    return Categories(by, names, ordering(metrics) or "psnr", found)


def category_rows(categories: Categories) -> list[list[str]]:
    """Rows of the table of categories, its head first: name, number of pictures, a cell for each measure."""
    found = categories.intervals()
    measures = list(next(iter(found.values())))
    rows = [[categories.by, "pictures", *(TITLES[name].title for name in measures)]]
    for category, intervals in found.items():
        cells = (cell(TITLES[name].form, intervals[name]) for name in measures)
        rows.append([category, str(categories.pictures[category]), *cells])
    return rows


def category_notes(categories: Categories) -> list[str]:
    """What a reader of the table must know."""
    few = [name for name, count in categories.pictures.items() if count < FEW_PROMPTS]
    notes = ["categories whose intervals overlap are not told apart"] if len(categories.pictures) > 1 else []
    if few:
        which = "all categories" if len(few) == len(categories.pictures) else ", ".join(few)
        notes.append(f"{which}: with fewer than {FEW_PROMPTS} pictures the intervals are too narrow to be trusted")
    return notes


def categories_text(categories: Categories, prompts: Sequence[str]) -> str:
    """The table, its notes, and the worst prompts."""
    title, form = TITLES[categories.worst_by].title, TITLES[categories.worst_by].form
    worst, values = categories.order[:WORST], categories.found.values()[categories.worst_by]
    rows = [[form.format(values[place]), categories.names[place], prompts[place]] for place in worst]
    return "".join(
        f"{line}\n"
        for line in [
            f"by {categories.by}, the worst {title} first [{LEVEL:.0%} interval]",
            *aligned(category_rows(categories)),
            *(f"note: {note}" for note in category_notes(categories)),
            f"worst {counted(len(worst), 'prompt')} by {title}",
            *aligned(rows),
        ]
    )
