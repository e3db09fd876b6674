"""The section of a run's page with scores by category of prompts."""

from typing import Any

from calib.evaluation.categories import Categories, category_notes, category_rows
from calib.runs.compare.columns import metric_of


def category_table(categories: Categories | None) -> dict[str, Any] | None:
    """Return what the page's template shows of categories; None where there are none."""
    if categories is None:
        return None
    head, *rows = category_rows(categories)
    title = metric_of(categories.worst_by).title
    return {"by": categories.by, "title": title, "head": head, "rows": rows, "notes": category_notes(categories)}
