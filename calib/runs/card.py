"""The card of an exported model, Markdown: what it is, how good it was predicted and measured, and how it was made."""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.base import VERSION
from calib.base.progress import counted, readable_bytes
from calib.evaluation.titles import TITLES
from calib.runs.record import RunRecord

LIBRARIES = {"mflux": "mflux", "mlx": "mlx", "recipe": None}


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        about: what the quantized model records of itself.
        size: its figures, by their keys in ``metrics.json``.
        layers: bits and group size of each quantized layer.
        repository: of the hub, which the weights came from.
        prompts: how many the model was evaluated on; 0: it was not.
        notes: what a reader of the evaluation's figures must know.
        use: lines that say how the folder is used.
        left_out: of so many layers the run rounded the inputs, which the folder does not.
        command: the command that exported it.
    """

    record: RunRecord
    about: Mapping[str, Any]
    size: Mapping[str, float]
    layers: Sequence[tuple[int, int]]
    repository: str | None
    prompts: int
    notes: Sequence[str]
    use: Sequence[str]
    left_out: int
    command: Sequence[str]
    form: str


def card_text(card: Card) -> str:
    """The card in Markdown, with the front matter that the Hugging Face hub reads."""
    model, parts = card.about.get("model"), [_front_matter(card)]
    parts.append(f"# {model}, {card.size['average_weight_bits']:.2f} bits a weight")
    parts.append(
        f"Quantized by calib {VERSION}: bits and group size of each layer follow from what rounding it was measured to "
        "do to the pictures, within a budget."
        if card.about.get("predicted_psnr") is not None
        else f"Quantized by calib {VERSION}."
    )
    parts.append("\n".join(card.use))
    parts.append(_size(card))
    parts.append(f"## Quality\n\n{_quality(card)}")
    commands = [shlex.join(part for part in command if part != "--") for command in (card.record.command, card.command)]
    listed = "\n".join(filter(None, commands)).replace(str(Path.home()), "~")
    parts.append(f"## Made by\n\n```text\n{listed}\n```")
    return "\n\n".join(parts) + "\n"


def _front_matter(card: Card) -> str:
    entries = {
        "base_model": card.repository,
        "base_model_relation": None if card.repository is None else "quantized",
        "library_name": LIBRARIES[card.form],
        "tags": ["calib"],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in entries.items() if value is not None]
    return "\n".join(["---", *lines, "---"])


def _size(card: Card) -> str:
    before, after = card.size["unquantized_bytes"], card.size["quantized_bytes"]
    rows = [
        (
            "weights made from",
            f"{card.repository or card.about.get('model')}, fingerprint `{card.about.get('fingerprint')}`",
        ),
        ("bits a weight, scales and biases counted", f"{card.size['average_weight_bits']:.3f}"),
        ("the same over the whole transformer", f"{card.size['bits_per_weight']:.3f}"),
        ("transformer", f"{readable_bytes(after)} of {readable_bytes(before)} at 16 bits ({after / before:.0%})"),
        ("quantized layers", _layers(card.layers)),
        ("quantizer", f"`{_named(card.about.get('quantizer'))}`"),
    ]
    return _table([("", ""), *rows])


def _layers(layers: Sequence[tuple[int, int]]) -> str:
    """How many layers have which bits."""
    found = sorted(Counter(bits for bits, _ in layers).items())
    return f"{len(layers)}: " + ", ".join(f"{count} of {bits} bits" for bits, count in found)


def _named(function: Any) -> str:
    """A recorded option with its parameters."""
    if not isinstance(function, Mapping):
        return "unknown"
    parameters = function.get("parameters", {})
    name = str(function.get("name", function.get("_target_", "unknown")))
    return " ".join([name, *(f"{key}={json.dumps(value)}" for key, value in parameters.items() if value is not None)])


def _quality(card: Card) -> str:
    metrics, lines = card.record.metrics, []
    predicted = card.about.get("predicted_weights_psnr")
    if predicted is not None:
        lines.append(f"Predicted for these weights, rounded to nearest: PSNR {predicted:.2f} dB.")
    if not card.prompts:
        return "\n\n".join([*lines, "Not measured in this run; `calib evaluate` does."])
    measured = {key: title for key, title in TITLES.items() if key in metrics}
    rows = [
        (title.label, _interval(metrics, key, title.form), _interval(metrics, f"control_{key}", title.form))
        for key, title in measured.items()
        if not title.of_sets
    ]
    seen = int(metrics.get("prompts_seen", 0))
    prompts = counted(card.prompts, "prompt" if seen else "held-out prompt")
    known = f" ({seen} of them calibrated or trained on)" if seen else ""
    lines.append(
        f"Measured on {prompts}{known}, the same seeds drawn at full precision and "
        "quantized; 95% intervals. The control has weights and latents rounded to bfloat16: what is not worse cannot "
        "be told from rounding."
    )
    lines.append(_table([("", "quantized", "control"), *rows]))
    if sets := {key: title for key, title in measured.items() if title.of_sets}:
        whole = [(title.label, _interval(metrics, key, title.form)) for key, title in sets.items()]
        reference = card.record.config.get("evaluation.reference")
        against = f"those of a folder, {Path(str(reference)).name}" if reference else "as many of full precision"
        lines.append(f"The whole set of {counted(card.prompts, 'picture')} against {against}; 95% intervals.")
        lines.append(_table([("", "quantized"), *whole]))
    if card.notes:
        lines.append("\n".join(f"- {note}" for note in card.notes))
    if card.left_out:
        bits = card.about.get("average_activation_bits")
        average = "" if bits is None else f", to {bits:.2f} bits on average"
        lines.append(
            f"These figures are of the run, which also rounded the inputs of {counted(card.left_out, 'layer')}"
            f"{average}. This folder has the weights alone, and inputs stay at 16 bits: it was not measured by itself."
        )
    return "\n\n".join(lines)


def _interval(metrics: Mapping[str, float], key: str, form: str) -> str:
    if key not in metrics:
        return ""
    ends = [metrics[f"{key}_{end}"] for end in ("low", "high") if f"{key}_{end}" in metrics]
    return form.format(metrics[key]) + (f" [{', '.join(map(form.format, ends))}]" if ends else "")


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest))
