"""Write the quantized model of a run in a form that other programs read; the command is in :mod:`calib.cli.export`.

Forms are folders of their own, each with a model card. What a form cannot hold is refused before anything is written.
"""

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.analysis.plan_file import read_layers
from calib.base.errors import CalibError, ConfigError
from calib.base.files import content_of, free_bytes, read_json, write_json, write_text
from calib.base.folders import check_new, new_folder
from calib.base.layout import DETAILS, MODEL, MODEL_CONFIG, PLAN
from calib.base.progress import Progress, counted, note, readable_bytes
from calib.base.safetensors import PIECE, copy_file
from calib.models.families import check_mflux, mflux_folder
from calib.quantization.checkpoint import CHECKPOINT, COPIES, WEIGHTS, load
from calib.quantization.model import QuantizedModel
from calib.quantization.recipe import recipe_of
from calib.runs.card import Card, card_text
from calib.runs.exchange import settle
from calib.runs.find import run_directories
from calib.runs.record import RunRecord, home_of, read_run
from calib.stages import Stage
from calib.stages.origin import check_quantized
from calib.stages.renew import renewing

import mlx.core as mx

#: Names in the folders.
CARD, RECIPE = "README.md", "recipe.json"
#: Forms without rules for activations.
OF_WEIGHTS = ("mflux", "recipe")


@dataclass(frozen=True)
class Source:
    """A run's quantized model, and what is known of it."""

    home: Path
    quantized: QuantizedModel
    record: RunRecord
    base: Path | None

    @property
    def folder(self) -> Path:
        return self.home / MODEL

    def setting(self, key: str) -> str | None:
        """A setting of the run's model, as text."""
        value = self.record.config.get(f"model.{key}")
        return None if value is None else str(value)


@dataclass(frozen=True)
class Form:
    """What is to be written.

    Attributes:
        nbytes: how much, about.
        write: writes it into a folder; is told whom to tell of bytes written.
        use: how people use the folder, a line of Markdown each; ``DIR`` stands for it.
    """

    nbytes: int
    write: Callable[[Path, Callable[[int], object]], None]
    use: tuple[str, ...]


def export(run: Path, form: str, into: Path, base: Path | None = None, weights_only: bool = False) -> str:
    """Write the new folder ``into``, whole or not at all; returns what was written, for people.

    Args:
        run: a run directory with a quantized model.
        form: one of :data:`FORMS`.
        base: for mflux: a folder with the other components; None: the one that the run used, or the hub's cache.
        weights_only: leave out rules for activations, where the form cannot hold them.

    Raises:
        ConfigError: there is no such run, ``into`` is not new, or the form cannot hold the model.
        CalibError: the model is damaged, or was changed.
    """
    check_new("--into", into)
    home = _home(run)
    check_quantized(home / MODEL)
    before = read_json(home / MODEL_CONFIG)
    _refuse_family(form, before)
    quantized = load(home / MODEL)
    if form in OF_WEIGHTS:
        _refuse(home, form, quantized, weights_only)
    source = Source(home, quantized, read_run(home, home.name), base)
    made = FORMS[form](source)
    size = quantized.size()
    what = f"{counted(len(quantized.layers), 'layer')} at {size.average_bits:.2f} bits a weight"
    command = ["calib", "export", str(run), "--format", form, "--into", str(into)]
    command += ["--weights-only"] * weights_only + ([] if base is None else ["--base", str(base)])
    evaluation = _evaluation(home)
    card = Card(
        record=source.record,
        about=quantized.about,
        size=size.metrics(),
        layers=[(packed.bits, packed.group_size) for packed in quantized.layers.values()],
        repository=source.setting("repository"),
        prompts=len(evaluation.get("prompts", ())),
        notes=evaluation.get("notes", ()),
        use=tuple(line.replace("DIR", into.name) for line in made.use),
        left_out=len(quantized.inputs) if form in OF_WEIGHTS else 0,
        command=command,
        form=form,
    )
    if free_bytes(into) < made.nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(into))
    with new_folder(into) as folder, _Bytes(made.nbytes) as written:
        made.write(folder, written.advance)
        write_text(folder / CARD, card_text(card))
        if read_json(home / MODEL_CONFIG) != before:
            raise CalibError(f"{home / MODEL}: was replaced while it was exported; run the same command again")
    return f"{into}: {what}, {readable_bytes(_bytes_in(into))} in all"


class _Bytes(Progress):
    """Progress in bytes."""

    def __init__(self, nbytes: int):
        super().__init__("export", -(-nbytes // PIECE), "piece", delay=2)
        self._rest = 0

    def advance(self, amount: int = 1) -> None:
        pieces, self._rest = divmod(self._rest + amount, PIECE)
        super().advance(pieces)


def _home(run: Path) -> Path:
    """The run directory that ``run`` is or lies in; raises where there is none, or no quantized model."""
    if not run.exists():
        raise ConfigError(f"{run}: no such run directory; calib run makes one")
    home = home_of(run)
    settle(home)
    if (home / MODEL_CONFIG).is_file():
        return home
    below = [] if home != run else [found for found in run_directories(run) if found != run]
    if below:
        raise ConfigError(f"{run}: holds {counted(len(below), 'run')}; name one of them, {below[0]} say")
    if not list(run_directories(home)):
        raise ConfigError(f"{run}: is no run directory; calib run makes one")
    make = renewing(Stage.QUANTIZE, home, f"plan={home}")
    raise ConfigError(f"{run}: no quantized model there; {make} makes one")


def _refuse_family(form: str, document: Any) -> None:
    """Raise where the form is for other models; before anything long, as a name is enough."""
    if form == "mflux" and isinstance(document, dict):
        check_mflux(str(document.get("model")), document)


def _refuse(home: Path, form: str, quantized: QuantizedModel, weights_only: bool) -> None:
    """Raise where the model has more than weights, each in one copy."""
    if quantized.copies:
        phases = ", ".join(quantized.copies)
        raise ConfigError(
            f"{home}: has other weights in phases ({phases}), which {form} cannot hold; analysis.per_phase=false plans "
            "without"
        )
    if turned := [name for name, packed in quantized.layers.items() if packed.rotation]:
        raise ConfigError(
            f"{home}: rotates {counted(len(turned), 'layer')} (quantizer.rotation), which {form} cannot hold; "
            f"quantizer.rotation=0 does without: calib quantize plan={home} quantizer=gptq quantizer.rotation=0"
        )
    if divided := [name for name, rule in quantized.inputs.items() if rule.divisors]:
        quantizer = quantized.about.get("quantizer", {}).get("name")
        raise ConfigError(
            f"{home}: divides the inputs of {counted(len(divided), 'layer')} channel by channel (quantizer={quantizer})"
            f", which {form} cannot hold; another quantizer does without: calib quantize plan={home} quantizer=gptq"
        )
    if quantized.inputs and not weights_only:
        average = quantized.about.get("average_activation_bits")
        bits = "" if average is None else f" to {average:.2f} bits"
        raise ConfigError(
            f"{home}: rounds the inputs of {counted(len(quantized.inputs), 'layer')}{bits}, which {form} cannot hold; "
            "--weights-only leaves that out, analysis.activation_bits=16 plans without"
        )


def _evaluation(home: Path) -> Mapping[str, Sequence[str]]:
    """Prompts on which the model was evaluated, and notes; none where it was not, or another one was."""
    if not (home / DETAILS).is_file():
        return {}
    details = read_json(home / DETAILS)
    made_from = details.get("made_from") if isinstance(details, dict) else None
    if not isinstance(made_from, dict) or made_from.get("quantized") != content_of(home / MODEL_CONFIG):
        return {}
    lists = {key: details.get(key) for key in ("prompts", "notes")}
    return {key: list(map(str, found)) for key, found in lists.items() if isinstance(found, list)}


def _mlx(source: Source) -> Form:
    """All files of the quantized model, as they are."""
    files = [path for name in (CHECKPOINT, WEIGHTS, COPIES) if (path := source.folder / name).is_file()]

    def write(folder: Path, advance: Callable[[int], object]) -> None:
        for path in files:
            copy_file(folder / path.name, path, advance)

    use = (
        f"`{WEIGHTS}` has every parameter by the path that it has in the network after `nn.quantize`; `{CHECKPOINT}`",
        "has bits and group size of each layer, and the rules for activations. In Python, with calib:",
        "`calib.quantization.checkpoint.load(Path('DIR'))`.",
    )
    return Form(sum(path.stat().st_size for path in files), write, use)


def _recipe(source: Source) -> Form:
    plan = read_layers(source.home / PLAN) if (source.home / PLAN).exists() else {}
    document = recipe_of(source.quantized, plan, source.setting("repository"))

    def write(folder: Path, advance: Callable[[int], object]) -> None:
        write_json(folder / RECIPE, document)

    return Form(1 << 20, write, (f"`{RECIPE}` has bits and group size of each layer by its module path.",))


def _mflux(source: Source) -> Form:
    quantized = source.quantized
    bits = quantized.size().average_bits
    checkpoint = source.setting("checkpoint")
    base = source.base
    if base is None and checkpoint is not None:
        base = Path(checkpoint).expanduser()
        if not base.is_dir():
            lost = f"model.checkpoint={checkpoint} of the run is not there"
            raise ConfigError(f"{lost}; name a folder with text encoder, decoder and tokenizer, --base DIR")
    arrays, weights = quantized.parameters(), source.folder / WEIGHTS
    folder = mflux_folder(quantized.about, weights, arrays, base, source.setting("repository"), bits)
    if any(packed.scales.dtype == mx.float16 for packed in quantized.layers.values()):
        note(
            "the run's model.dtype was float32, so 16 bits are float16 here: mflux computes with them in float32, in "
            "more time and memory; with model.dtype=bfloat16 it computes in that"
        )
    return Form(folder.nbytes, folder.write, ("```bash", f'{folder.family.command} --model ./DIR --prompt "…"', "```"))


FORMS: dict[str, Callable[[Source], Form]] = {"mflux": _mflux, "mlx": _mlx, "recipe": _recipe}


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
