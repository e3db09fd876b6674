"""``calib export``: the quantized model of a run as a folder for other programs."""

from collections.abc import Sequence
from pathlib import Path

from calib.base.errors import ConfigError
from calib.base.folders import check_new
from calib.cli.parser import Parser

#: Forms, those first that have weights without rules for activations.
FORMATS = ("mflux", "recipe", "mlx")
HELP = """Writes the quantized model of the run directory RUN as the new folder DIR, for other programs.

  mflux   a folder that mflux draws from: --model DIR. Text encoder, decoder and tokenizer come from --base, else from
          what the run used (model.checkpoint, or the hub's cache); nothing is downloaded
  mlx     the run's quantized/ as it is, which MLX loads: packed weights, bits, rules for activations
  recipe  recipe.json alone: bits and group size of each layer by its module path, for other converters

Each with a model card, README.md: bits, bytes, predicted and measured quality, the commands. What a format cannot hold
is refused, and then nothing is written.
"""
END = """exit status: 0 done, 1 the model or a file is damaged, 2 wrong arguments, or the format cannot hold the model

examples
  calib export outputs/… --format mflux --into z-image-4.5bit
  calib export outputs/… --format mflux --into z-image-4.5bit --weights-only    of a run that also rounded inputs
  calib export outputs/… --format recipe --into recipe
"""


def export_command(arguments: Sequence[str]) -> int:
    """Run ``calib export`` with ``arguments``; returns the exit status."""
    parser = Parser("export", HELP, END)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run directory of calib run or calib quantize")
    parser.add_argument("--format", choices=FORMATS, required=True, help="for which program")
    parser.add_argument("--into", metavar="DIR", type=Path, required=True, help="a new folder")
    parser.add_argument("--base", metavar="DIR", type=Path, help="mflux: has the other components, as on the hub")
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="mflux, recipe: the weights of a run that also rounded inputs, which stay at 16 bits in the folder",
    )
    given = parser.parse_args(arguments)
    if given.base is not None and given.format != "mflux":
        raise ConfigError(f"--base {given.base}: is for --format mflux; {given.format} takes nothing from elsewhere")
    if given.weights_only and given.format not in FORMATS[:2]:
        raise ConfigError(f"--weights-only: --format {given.format} holds the rules for inputs too; leave it out")
    if not given.run.exists():
        raise ConfigError(f"{given.run}: no such run directory; calib run makes one")
    check_new("--into", given.into)
    from calib.stages.export import export

    try:
        print(export(given.run, given.format, given.into, given.base, given.weights_only))
    except KeyboardInterrupt as interrupt:
        interrupt.args = ("nothing was written",)
        raise
    return 0
