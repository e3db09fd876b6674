"""Makes the page of two folders of pictures: the measures, and the worst pairs side by side."""

import shlex
import sys

from calib.base.progress import counted
from calib.evaluation.folders import FolderComparison
from calib.evaluation.folders_report import measure_rows, notes, shown, worst_pairs
from calib.evaluation.titles import TITLES
from calib.runs.pages.page import render
from calib.runs.pages.pictures import LOSSLESS, data_address


def folders_page(found: FolderComparison, most: int) -> str:
    """Return the page; the ``most`` worst pairs are shown with their pictures."""
    names, rows, small = list(found.pairs), [], True
    for place in found.order[:most]:
        cells = []
        for path in found.pairs[names[place]]:
            address, size = data_address(path)
            cells.append(address)
            small = small and max(size) <= LOSSLESS
        values = [(TITLES[name].title, shown(name, float(own[place]))) for name, own in found.values.items()]
        rows.append({"name": names[place], "cells": cells, "values": values})
    head, *measures = measure_rows(found)
    sizes = [f"{width}×{height}" for width, height in list(found.sizes)[:3]]
    return render(
        "folders.html",
        title=f"{found.folders[0].name} and {found.folders[1].name}",
        facts=[counted(len(names), "pair"), *sizes],
        notes=notes(found),
        head=head,
        measures=measures,
        columns=[str(folder) for folder in found.folders],
        pairs=rows,
        heading=worst_pairs(found),
        whole=len(names),
        small=small,
        command=shlex.join(["calib", *sys.argv[1:]]),
    )
