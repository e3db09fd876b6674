"""Commands on existing files, with ordinary arguments and without Hydra.

Each imports its part of calib itself, as those of the others would keep it waiting.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.base.encoding import print_documents
from calib.base.errors import CalibError, ConfigError
from calib.base.layout import ACTIVATIONS, CONVERGENCE_PLOT, PLAN
from calib.base.progress import counted
from calib.cli.parser import Parser

if TYPE_CHECKING:
    from calib.dataset.rebuild import Rebuilt
    from calib.dataset.repair import Repair

VERIFY_HELP = """Reads every file of the dataset, or of the run, in DIR and says whether it is sound.

Found are: missing, truncated and altered files; NaN, infinite or implausible latents; constant pictures; entries of
manifest.json that disagree with what the files say of themselves (prompt, seed, settings); images of other settings;
files that no entry names, and what killed processes left half-written. A dataset of the older layout has no checksums:
its files are judged by reading them. A file that another program holds open for writing is not judged, and stays.

In a run directory, or in those of a sweep: damaged files, files changed after the job, and products of another origin
than what lies beside them, each with the command that renews it.
"""
VERIFY_END = """exit status: 0 sound, 1 not sound, not known or no dataset, 2 wrong arguments

examples
  calib verify calibration_data/emoji-…            a table, and one verdict
  calib verify DIR --json | jq .bad_images
  calib verify DIR --repair && calib generate …    the same bytes as if nothing had happened
  calib verify outputs/…                           a run: statistics, plan, model, evaluation
"""
REBUILD_HELP = """Writes DIR/manifest.json anew from the files beside it.

For a dataset of calib's it is the lost manifest to the byte; images whose files are not all there and sound are listed
and left out. For one of the older layout it holds what its files say, and what they do not is listed.
The manifest that was there is renamed, never deleted.
"""
REBUILD_END = "exit status: 0 restored, 1 not, 2 wrong arguments"
CONVERGENCE_HELP = """Says whether the run in DIR saw enough images: how far ranges of its layers still move.

From 10, 25, 50, 100 and all images (a bootstrap over prompts): how far the full range and the central range, p99 - p01,
of each layer's input lie from those of all images. Steps that the sampler never evaluates are left out.
"""
CONVERGENCE_END = """exit status: 0 done, 1 not, 2 wrong arguments

examples
  calib convergence outputs/…                      a table of the worst layers, DIR/convergence.png, and a verdict
  calib convergence DIR --layers 3 --plot movement.png
  calib convergence DIR --json | jq .verdict       every layer is in it
"""
MERGE_HELP = """Joins the run directories of all shards of one collection into the new folder INTO.

Its activations.h5, layer_statistics.json and collection_metadata.json hold what a collection of all images at once
would: the same bits, whatever the split. The shards' directories are left as they are.
"""
MERGE_END = """exit status: 0 joined, 1 not, 2 wrong arguments

examples
  calib collect shard.index=0 shard.count=2 hydra.run.dir=shards/0     and, elsewhere or at once, shard.index=1
  calib merge shards/* --into whole && calib analyze stats=whole
"""


def verify_command(arguments: Sequence[str]) -> int:
    """Run ``calib verify`` with ``arguments``; returns the exit status."""
    parser = Parser("verify", VERIFY_HELP, VERIFY_END)
    parser.add_argument("data_dir", metavar="DIR", type=Path, help="the folder of the dataset, or of the run")
    parser.add_argument("--json", action="store_true", help="print one JSON document, every finding in it")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="move what is wrong into DIR/aside/<time>/ and take it off the manifest, for calib generate to make it "
        "again; nothing is deleted",
    )
    given = parser.parse_args(arguments)
    if runs := _runs_in(given.data_dir):
        return _verify_runs(runs, given.json, given.repair)
    from calib.dataset.repair import repair
    from calib.dataset.report import report_json, report_text
    from calib.dataset.verify import verify

    try:
        repaired = repair(given.data_dir) if given.repair else None
        report = verify(given.data_dir) if repaired is None else repaired.before
    except CalibError as error:
        if given.json:
            _print_json({"data_dir": str(given.data_dir), "sound": False, "error": str(error)})
        raise
    except KeyboardInterrupt as interrupt:
        if not given.repair:
            interrupt.args = ("nothing was changed",)
        raise
    if given.json:
        _print_json({**report_json(report), "repair": None if repaired is None else _repair_json(repaired)})
    else:
        print(report_text(report, report.verdict if repaired is None else _repair_text(repaired)), end="")
    return 0 if report.sound or (repaired is not None and not report.unsettled) else 1


def _runs_in(folder: Path) -> list[Path]:
    """``folder`` where it is a run directory, or those of a sweep in it; none where it is a dataset or neither."""
    from calib.dataset.manifest import MANIFEST
    from calib.runs.find import run_directories

    if (folder / MANIFEST).exists():
        return []
    # What calib merge joined has none of the files of a job.
    return [folder] if any((folder / name).exists() for name in (ACTIVATIONS, PLAN)) else list(run_directories(folder))


def _verify_runs(runs: Sequence[Path], as_json: bool, repair: bool) -> int:
    if repair:
        runs_on = "calib collect, analyze, quantize and evaluate renew it"
        raise ConfigError(f"--repair: {runs[0]} is a run directory; {runs_on}")
    from calib.stages.verify_run import verify_run

    found = {run: verify_run(run) for run in runs}
    problems = {run: [problem for part in parts.values() for problem in part] for run, parts in found.items()}
    if as_json:
        documents = [{"run": str(run), "sound": not problems[run], "problems": found[run]} for run in runs]
        _print_json(documents[0] if len(runs) == 1 else {"sound": not any(problems.values()), "runs": documents})
    else:
        for run in runs:
            print(*problems[run], sep="\n", end="\n" if problems[run] else "")
            count = counted(len(problems[run]), "problem")
            print(f"{run}: {count}" if problems[run] else f"sound: {', '.join(found[run])} of {run}")
    return 1 if any(problems.values()) else 0


def _print_json(document: Mapping[str, Any]) -> None:
    print_documents()
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _repair_json(done: "Repair") -> dict[str, Any]:
    return {"aside": str(done.aside), "moved": done.moved, "images": done.images, "sound": not done.before.unsettled}


def _repair_text(done: "Repair") -> str:
    before = done.before
    again = "; calib generate makes the others again" if done.images and not before.manifest.is_older else ""
    remains = f"what remains is sound: {counted(before.good, 'image')}"
    if before.unsettled:
        remains = f"what remains is sound but for {before.not_judged}: {counted(before.good, 'image')}"
    return f"repaired: {counted(len(done.moved), 'file')} moved to {done.aside}; {remains}{again}"


def rebuild_manifest_command(arguments: Sequence[str]) -> int:
    """Run ``calib rebuild-manifest`` with ``arguments``; returns the exit status."""
    parser = Parser("rebuild-manifest", REBUILD_HELP, REBUILD_END)
    parser.add_argument("data_dir", metavar="DIR", type=Path, help="the dataset's folder")
    parser.add_argument("--force", action="store_true", help="even where manifest.json is there and readable")
    given = parser.parse_args(arguments)
    from calib.dataset.rebuild import rebuild_manifest

    print(_rebuilt_text(given.data_dir, rebuild_manifest(given.data_dir, given.force)))
    return 0


def _rebuilt_text(data_dir: Path, done: "Rebuilt") -> str:
    from calib.dataset.manifest import MANIFEST
    from calib.dataset.report import findings_table

    lines = [f"{data_dir / MANIFEST}: restored from the files, {counted(done.images, 'image')}"]
    if done.kept is not None:
        lines.append(f"the manifest that was there is now {done.kept}")
    if done.left_out:
        left_out = counted(len({finding.image_id for finding in done.left_out}), "image")
        lines += [*findings_table(done.left_out), ""]
        lines.append(
            f"{left_out} left out; calib verify {data_dir} --repair moves them aside, calib generate draws them again"
        )
    lines += [f"unknown: {line}" for line in done.unknown]
    return "\n".join(lines)


def convergence_command(arguments: Sequence[str]) -> int:
    """Run ``calib convergence`` with ``arguments``; returns the exit status."""
    parser = Parser("convergence", CONVERGENCE_HELP, CONVERGENCE_END)
    parser.add_argument("run", metavar="DIR", type=Path, help="a run directory that calib collect made")
    parser.add_argument(
        "--layers", type=_at_least_one, default=10, metavar="N", help="how many of the worst to show (10)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document: every layer, p01 and p99 too")
    parser.add_argument("--plot", type=_png, metavar="PATH", help="where the picture goes (DIR/convergence.png)")
    given = parser.parse_args(arguments)
    from calib.analysis.convergence import convergence, read_image_ranges
    from calib.analysis.convergence_report import convergence_json, convergence_text, write_plot
    from calib.runs.exchange import settle

    settle(given.run)
    plot = given.run / CONVERGENCE_PLOT if given.plot is None else given.plot
    found = convergence(read_image_ranges(given.run))
    write_plot(found, plot, given.layers)
    if given.json:
        _print_json(convergence_json(found, given.run, plot))
    else:
        print(convergence_text(found, given.run, given.layers) + f"plot: {plot}")
    return 0


def merge_command(arguments: Sequence[str]) -> int:
    """Run ``calib merge`` with ``arguments``; returns the exit status."""
    parser = Parser("merge", MERGE_HELP, MERGE_END)
    parser.add_argument(
        "runs",
        metavar="DIR",
        type=Path,
        nargs="+",
        help="run directories of the shards, all of them, or the folder of their sweep",
    )
    parser.add_argument("--into", metavar="INTO", type=Path, required=True, help="a new folder")
    given = parser.parse_args(arguments)
    from calib.runs.find import run_directories
    from calib.stages.merge import merge

    # A sweep's folder stands for the run directories in it.
    runs = [run for given_run in given.runs for run in (list(run_directories(given_run)) or [given_run])]
    images = merge(runs, given.into)
    print(f"{given.into}: {counted(images, 'image')} of {counted(len(runs), 'shard')}")
    return 0


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of layers, 1 or more")
    return int(text)


def _png(text: str) -> Path:
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return Path(text)
