"""``calib compare``: runs beside each other, read from their directories alone, without MLX and Hydra."""

import argparse
import io
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from calib.base.encoding import print_documents
from calib.base.errors import ConfigError
from calib.base.files import write_text
from calib.cli.parser import Parser
from calib.runs.compare.comparison import DEFAULT_PARETO, Comparison, compare
from calib.runs.compare.tables import csv_text, json_text, markdown_text, terminal_table
from calib.runs.find import read_runs

HELP = """Compares run directories: what differs in configuration, and what came out.

DIR is a run's folder, a sweep's folder or a pattern; everything is read from the directories themselves. Runs that
failed or are incomplete are listed as such, with the reason.
"""
END = """exit status: 0 done, 1 files cannot be read or written, 2 wrong arguments

examples
  calib compare multirun/analysis                                     a sweep, as a table
  calib compare 'multirun/*' --sort -psnr --where 'average_weight_bits<=4.6'
  calib compare multirun/analysis --baseline analysis=range --html comparison.html
  calib compare RUN1 RUN2 --layers                                    where two plans differ
"""


def _parser() -> Parser:
    parser = Parser("compare", HELP, END)
    parser.add_argument("runs", metavar="DIR", nargs="+", help="a run's folder, a sweep's, or a pattern")
    parser.add_argument("--sort", action="append", default=[], metavar="KEY", help="by a column; -KEY for descending")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="COND",
        help="only runs with e.g. 'psnr>30', 'size<5.5', 'state=failed'",
    )
    parser.add_argument("--baseline", metavar="RUN", help="show differences to this one")
    parser.add_argument(
        "--pareto",
        default=",".join(DEFAULT_PARETO),
        metavar="X,Y",
        help=f"metrics of the Pareto front ({','.join(DEFAULT_PARETO)})",
    )
    parser.add_argument("--all", action="store_true", help="every metric and setting; with --layers every layer")
    parser.add_argument("--layers", action="store_true", help="of two runs: where their plans differ")
    for form in ("csv", "json", "markdown"):
        parser.add_argument(f"--{form}", nargs="?", const="-", metavar="PATH", help=f"as {form}; without PATH printed")
    parser.add_argument("--html", metavar="PATH", help="as a page of its own, with plots and pictures")
    return parser


def _joined(arguments: Sequence[str]) -> list[str]:
    """Join ``--sort -psnr`` to one argument, as argparse takes what begins with a dash for a flag."""
    joined: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--sort" and rest and rest[0].startswith("-") and not rest[0].startswith("--"):
            argument = f"--sort={rest.pop(0)}"
        joined.append(argument)
    return joined


def compare_command(arguments: Sequence[str]) -> int:
    """Run ``calib compare`` with ``arguments``; returns the exit status."""
    given = _parser().parse_args(_joined(arguments))
    runs = read_runs(given.runs)
    if given.layers:
        from calib.runs.compare import plans  # NumPy, which whole runs are compared without

        _refuse_for_layers(given)
        found = plans.compare_plans(runs, given.all)
        forms = {"csv": plans.plans_csv, "json": plans.plans_json, "markdown": plans.plans_markdown}
        _write(given, found, forms, plans.plans_text)
        return 0
    axes = given.pareto.split(",")
    if len(axes) != 2:
        raise ConfigError(f"--pareto {given.pareto}: must be two metrics, e.g. quantized_bytes,psnr")
    options = {"where": given.where, "sort": given.sort, "baseline": given.baseline, "every": given.all}
    comparison = compare(runs, pareto=(axes[0], axes[1]), **options)
    if given.html:
        from calib.runs.pages.comparison import comparison_page  # slow to import, and needed here alone

        write_text(Path(given.html), comparison_page(comparison, Path(given.html).absolute().parent))
        print(f"page: {given.html}", file=sys.stderr)
    tables = {"csv": csv_text, "json": json_text, "markdown": markdown_text}
    _write(given, comparison, tables, _for_terminal)
    return 0


def _refuse_for_layers(given: argparse.Namespace) -> None:
    """Raise for options that have no meaning for two plans."""
    if given.html:
        raise ConfigError("--html: is a page of whole runs; with --layers use --csv, --json or --markdown")
    if useless := [flag for flag in ("sort", "where", "baseline") if getattr(given, flag)]:
        raise ConfigError(f"--{useless[0]}: is for a table of runs; --layers compares two plans, layer by layer")


def _for_terminal(comparison: Comparison) -> str:
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return terminal_table(comparison, shutil.get_terminal_size((120, 24)).columns, colour)


def _write(
    given: argparse.Namespace, found: object, forms: dict[str, Callable[..., str]], plain: Callable[..., str]
) -> None:
    """Write ``found`` in the forms that are asked for, and print it as a table unless one of them is printed."""
    if len(both := [f"--{form}" for form in forms if getattr(given, form) == "-"]) > 1:
        raise ConfigError(f"{' '.join(both)}: only one of them can be printed; give the others a PATH")
    printed = any(getattr(given, form) == "-" for form in forms)
    if printed:
        print_documents()
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a sign shows another, as wide
    for form, make in forms.items():
        where = getattr(given, form)
        if where == "-":
            print(make(found), end="")
        elif where is not None:
            write_text(Path(where), make(found))
            print(f"{form}: {where}", file=sys.stderr)
    if not printed:
        print(plain(found), end="")
    sys.stdout.flush()
