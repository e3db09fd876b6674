"""Fills a template of a page; style and script are inlined."""

import json
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from calib.base import VERSION

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("calib.runs.pages")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def _asset(name: str) -> str:
    return resources.files("calib.runs.pages").joinpath("templates", name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """Return the page ``template`` filled with ``values``; texts are escaped unless :func:`trusted` marks them."""
    page = _environment().get_template(template)
    own = {"style": trusted(_asset("style.css")), "script": trusted(_asset("page.js")), "version": VERSION}
    return page.render(**own, **values)


def trusted(html: str) -> Any:
    """Mark markup that calib made itself: it is not escaped."""
    from markupsafe import Markup

    return Markup(html)


def embedded(value: Any) -> Any:
    """Return JSON for a script element; no text in it can end the element."""
    return trusted(json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))
