"""Writes the page of one run: what it was asked, what came out, and what it looks like."""

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from calib.activations.reader import ActivationFile
from calib.analysis.plan import LayerPlan
from calib.analysis.plan_file import read_entries, read_layer
from calib.analysis.sensitivities import trust_note
from calib.analysis.steps import StepPlan, read_steps
from calib.base.errors import CalibError, reason_of
from calib.base.files import read_json, read_text, write_text
from calib.base.layout import ACTIVATIONS, DETAILS, ENVIRONMENT, HYDRA_OVERRIDES, LOG, PAGE, PLAN, STEPS, SUMMARY
from calib.base.locks import open_regular
from calib.base.progress import readable_bytes, readable_duration
from calib.evaluation.categories import Categories
from calib.evaluation.metrics import Fidelity
from calib.evaluation.report import seen_note
from calib.evaluation.titles import TITLES
from calib.runs.compare.columns import metric_of
from calib.runs.pages.categories import category_table
from calib.runs.pages.charts import error_chart, histogram_charts
from calib.runs.pages.layers import (
    BitTable,
    Ranges,
    bit_tables,
    chosen_layers,
    clip_of,
    own_name,
    ranges_of,
    shape_of,
)
from calib.runs.pages.maps import bits_part, drift_part, range_part
from calib.runs.pages.page import render, trusted
from calib.runs.pages.parts import Part, curve_of
from calib.runs.pages.pictures import LOSSLESS, Pair, pairs, pictures_of
from calib.runs.pages.sensitivity import reach_part, sensitivity_part
from calib.runs.record import RunRecord, read_run, read_yaml

#: Lines of a failed run's log that are shown.
TRACE_LINES = 60
#: Bytes at the end of the log among which they are looked for.
TRACE_BYTES = 100_000


@dataclass
class PageParts:
    """The parts of a page that a run directory has something to show for; ``problems`` names those that failed."""

    plan: Mapping[str, LayerPlan] = field(default_factory=dict)
    tables: list[BitTable] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    categories: Categories | None = None
    remarks: list[str] = field(default_factory=list)
    figures: list[Part] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    analysis: str = ""

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """Turn whatever the body raises, for example of a damaged file, into a line of ``problems``."""
        try:
            yield
        except Exception as error:  # readers of damaged files raise what they like
            self.problems.append(f"{what}: {reason_of(error)}")


def write_page(run: Path) -> Path:
    """Write the page of the run directory ``run``, whole or not at all, and return its path."""
    write_text(run / PAGE, run_page(run))
    return run / PAGE


def run_page(path: Path) -> str:
    """Return the page of a run directory, made of whatever is in it."""
    run, parts = read_run(path, path.resolve().name), page_parts(path)
    surroundings = _surroundings(path)
    return render(
        "run.html",
        title=_title(run, path),
        run=run,
        facts=_facts(run, surroundings),
        trace=_trace(path) if run.state != "complete" else "",
        tiles=_tiles(run.metrics),
        remarks=_remarks(run.metrics, parts, len(pictures_of(path))),
        pairs=parts.pairs,
        categories=category_table(parts.categories),
        pictures=len(pictures_of(path)),
        small=bool(parts.pairs) and max(parts.pairs[0].size) <= LOSSLESS,
        tables=parts.tables,
        notes=_notes(parts.plan),
        parts=parts.figures,
        problems=[*parts.problems, *(run.problems if run.state == "complete" else ())],
        command=command_of(run),
        machine=_machine(surroundings),
        config=list(run.config.items()),
        metrics=[(key, f"{value:.6g}") for key, value in run.metrics.items()],
        analysis=parts.analysis,
    )


def page_parts(path: Path) -> PageParts:
    """Read what the run directory ``path`` holds, and draw it."""
    parts = PageParts()
    details: dict[str, Any] = {}
    if (path / DETAILS).exists():
        with parts.trying("evaluation"):
            details = read_json(path / DETAILS)
            if "categories" in details:
                found = Fidelity.from_json(details["quantized"])
                parts.categories = Categories.from_json(details["categories"], found)
            parts.pairs = pairs(path, details, parts.categories)
            parts.remarks = [str(note) for note in details.get("notes", ())]
    if (path / PLAN).exists():
        with parts.trying("the plan"):
            parts.plan = _readable_layers(path / PLAN, parts)
            parts.tables = bit_tables(parts.plan)
    if (path / SUMMARY).exists():
        with parts.trying("the analysis"):
            parts.analysis = read_text(path / SUMMARY)
    if details:
        with parts.trying("error against step"):
            parts.figures.append(_error_part(details))
    if (path / ACTIVATIONS).exists():
        with parts.trying("statistics"), ActivationFile(path / ACTIVATIONS) as file:
            ranges = ranges_of(file)
            parts.figures.append(range_part(ranges))
            parts.figures.append(drift_part(ranges))
            with parts.trying("histograms"):
                parts.figures += _histogram_part(file, ranges, parts, path)
    predicted: Mapping[str, Any] = {}
    with suppress(CalibError):  # of damaged steps, which the histograms report
        steps = read_steps(path / STEPS)
        predicted = steps.predicted
        with parts.trying("bits of inputs"):
            parts.figures += bits_part(steps)
    with parts.trying("sensitivities"):
        parts.figures += sensitivity_part(parts.plan, predicted)
    with parts.trying("how errors reach the picture"):
        parts.figures += reach_part(predicted)
    return parts


def _readable_layers(path: Path, parts: PageParts) -> dict[str, LayerPlan]:
    """Return the layers of a plan; those that are damaged are left out, and the first of them is named."""
    layers, damaged = {}, list[CalibError]()
    for name, entry in read_entries(path).items():
        try:
            layers[name] = read_layer(path, name, entry)
        except CalibError as error:
            damaged.append(error)
    if damaged:
        more = f" ({len(damaged)} layers are damaged)" if len(damaged) > 1 else ""
        parts.problems.append(f"the plan: {damaged[0]}{more}")
    return layers


def _title(run: RunRecord, path: Path) -> str:
    here = path.resolve()
    return f"{here.parent.name}/{run.name}"


def _surroundings(path: Path) -> Mapping[str, Any]:
    try:
        document = read_json(path / ENVIRONMENT)
    except CalibError:
        return {}
    return document if isinstance(document, dict) else {}


def _facts(run: RunRecord, surroundings: Mapping[str, Any]) -> list[str]:
    facts = [f"calib {run.stage}" if run.stage else "", str(run.config.get("model.name") or "")]
    if run.start:
        facts.append(run.start.replace("T", " ").replace("+00:00", " UTC"))
        if run.end:
            took = datetime.fromisoformat(run.end) - datetime.fromisoformat(run.start)
            facts.append(f"took {readable_duration(took.total_seconds())}")
    return [fact for fact in [*facts, str(surroundings.get("device") or "")] if fact]


def _machine(surroundings: Mapping[str, Any]) -> list[str]:
    versions = surroundings.get("versions")
    commit = surroundings.get("git_commit")
    return [
        *([f"{name} {value}" for name, value in versions.items()] if isinstance(versions, dict) else []),
        *(str(surroundings[key]) for key in ("platform", "blas") if surroundings.get(key)),
        *([f"commit {commit}"] if commit and commit != "unknown" else []),
    ]


def command_of(run: RunRecord) -> str:
    """Return the command that makes such a run alone, also of a job that a sweep made."""
    overrides = run.path / HYDRA_OVERRIDES
    try:
        given = [str(o) for o in read_yaml(overrides)]
    except (CalibError, TypeError):
        return shlex.join(["calib", *run.command[1:]]) if run.command else "calib"
    kept = [o for o in given if o.partition("=")[0] not in ("stage", "swept", "hparams_search")]
    stage = [run.stage] if run.stage and run.stage != "run" else []
    return shlex.join(["calib", *stage, *kept])


def _trace(path: Path) -> str:
    try:
        with open_regular(path / LOG) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TRACE_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-TRACE_LINES:])


def _alone(form: str) -> str:
    """Return the format of a number outside of any column: it needs no power of ten in common with others."""
    return "{:.3g}" if "e" in form else form


def _tiles(metrics: Mapping[str, float]) -> list[dict[str, str]]:
    tiles = []

    def tile(key: str, note: str = "") -> None:
        if key in metrics:
            metric = metric_of(key)
            value = _alone(metric.form).format(metrics[key] * metric.scale)
            tiles.append({"title": metric.title, "value": value, "unit": metric.unit, "note": note})

    sets = (key for key, title in TITLES.items() if title.of_sets)
    by_clip = ("clip_similarity", "clip_score", "clip_score_change")
    for key in ("psnr", "ssim", "lpips_effnet", "output_error", *by_clip, *sets):
        form, note = _alone(metric_of(key).form), ""
        if f"{key}_low" in metrics and f"{key}_high" in metrics:
            note = f"95%: {form.format(metrics[f'{key}_low'])} to {form.format(metrics[f'{key}_high'])}"
        if f"control_{key}" in metrics:
            note += f"; noise floor {form.format(metrics[f'control_{key}'])}"
        if key == "psnr" and "predicted_psnr" in metrics:
            note += f"; predicted {form.format(metrics['predicted_psnr'])}"
            note += ", beyond what can be predicted well" * bool(trust_note(metrics["predicted_psnr"]))
            alone = metrics.get("predicted_weights_psnr", metrics["predicted_psnr"])
            note += f" ({form.format(alone)} with inputs at 16 bits)" if alone != metrics["predicted_psnr"] else ""
        tile(key, note)
    tile("average_weight_bits", "quantized layers, scales and biases counted")
    if "quantized_bytes" in metrics and metrics.get("unquantized_bytes"):
        own, whole = metrics["quantized_bytes"], metrics["unquantized_bytes"]
        number, _, unit = readable_bytes(own).partition(" ")
        note = f"of {readable_bytes(whole)} at 16 bits ({own / whole:.0%})"
        tiles.append({"title": metric_of("quantized_bytes").title, "value": number, "unit": unit, "note": note})
    tile("average_activation_bits", "over the numbers that layers read, at all steps")
    if "average_activation_bits" not in metrics:  # of calib 0.2.0 and earlier
        tile("mean_activation_bits", "mean over layers")
    if "images" in metrics and "steps" in metrics:
        layers = f"of {metrics['layers']:.0f} layers" if "layers" in metrics else ""
        value = f"{metrics['images']:.0f} × {metrics['steps']:.0f}"
        tiles.append({"title": "images × steps observed", "value": value, "unit": "", "note": layers})
    seconds = {k.removesuffix("_seconds"): v for k, v in metrics.items() if k.endswith("_seconds")}
    if seconds:
        longest = max(seconds, key=lambda key: seconds[key])
        number, _, unit = readable_duration(sum(seconds.values())).partition(" ")
        note = f"most of it: {longest}, {readable_duration(seconds[longest])}"
        tiles.append({"title": "time of all stages", "value": number, "unit": unit, "note": note})
    return tiles


def _remarks(metrics: Mapping[str, float], parts: PageParts, pictures: int) -> list[str]:
    """Return what a reader of the evaluation's figures must know."""
    seen = seen_note(int(metrics.get("prompts_seen", 0)), pictures)
    return [*parts.remarks, *([seen] if seen else [])]


def _notes(plan: Mapping[str, LayerPlan]) -> list[str]:
    sensitive = sum(layer.sensitive for layer in plan.values())
    note = f"{sensitive} of {len(plan)} layers are sensitive: ringed" if sensitive else "no layer is marked sensitive"
    return [note] if plan else []


def _error_part(details: Mapping[str, Any]) -> Part:
    curves = [curve_of(details["quantized"], "quantized"), curve_of(details["control"], "control, all in bfloat16")]
    note = "The model's output on the same states, mean and 95% interval over prompts. The control is the noise floor."
    return Part("error", "Error against step", note, trusted(error_chart("error", curves)))


def _histogram_part(file: ActivationFile, ranges: Ranges, parts: PageParts, path: Path) -> list[Part]:
    steps = StepPlan()
    with parts.trying("the plan's clips"):
        steps = read_steps(path / STEPS)
    chosen = [(own_name(row), why) for row, why in chosen_layers(ranges, parts.plan)]
    shapes = [shape_of(file.by_step(layer), ranges.steps, layer, why, clip_of(steps, layer)) for layer, why in chosen]
    drawn = [shape for shape in shapes if shape is not None]
    note = "Shares of values against value, of a few layers; over each, why it was chosen."
    return [Part("histograms", "Inputs by step", note, trusted(histogram_charts("histograms", drawn)))] if drawn else []
