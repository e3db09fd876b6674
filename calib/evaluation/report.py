"""Report the results of :mod:`calib.evaluation.metrics`: a table as text, a plot of errors, a grid of pictures."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.base.encoding import aligned
from calib.base.errors import CalibError
from calib.base.files import replacing
from calib.base.progress import counted
from calib.evaluation.agreement import score_lines
from calib.evaluation.metrics import (
    FEW_PROMPTS,
    LEVEL,
    MOST_PSNR,
    NO_ERROR,
    Fidelity,
    Interval,
    bootstrap_columns,
    bootstrap_difference,
    first_and_last_fifth,
    growth,
)
from calib.evaluation.sets import SetDistance
from calib.evaluation.titles import TITLES

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Largest ratio between the first and the last fifth of the steps at which an error counts as level.
LEVEL_GROWTH = 1.1

#: Pixels of a picture's longer side in the grid: smaller pictures are enlarged by a whole factor to at least the first,
#: larger ones reduced to the second.
SMALLEST, LARGEST = 128, 384
AMPLIFIED = 5


def fidelity_text(quantized: Fidelity, control: Fidelity, steps: int) -> str:
    """The report as text: means over prompts, the error against step, and notes.

    Both results must be of the same prompts, in the same order, the control perhaps of the first alone; ``steps`` is
    the sampler's number of steps.
    """
    lines = [
        f"{counted(quantized.prompts, 'prompt')}; output error at {len(quantized.steps)} of {counted(steps, 'step')}",
        *_table(quantized, control),
        *score_lines(quantized.further, "full precision"),
        _error_against_step(quantized),
        *(f"note: {note}" for note in _notes(quantized, control)),
    ]
    return "\n".join(lines) + "\n"


def _table(quantized: Fidelity, control: Fidelity) -> list[str]:
    ours, floor = quantized.intervals(), control.intervals()
    rows = [("", f"quantized [{LEVEL:.0%} interval]", f"control, noise floor [{LEVEL:.0%} interval]")]
    for name in ours:
        own = TITLES[name]
        rows.append((own.label, cell(own.form, ours[name]), cell(own.form, floor[name])))
    return aligned(rows)


def cell(form: str, interval: Interval) -> str:
    """A mean with its interval, each by ``form``."""
    mean, low, high = (form.format(value) for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def _error_against_step(found: Fidelity) -> str:
    curve = found.error.mean(axis=0)
    first, last = first_and_last_fifth(curve, found.steps)
    grown = growth(curve, found.steps)
    if grown > LEVEL_GROWTH:
        change = f"grows {grown:.3g}-fold" if first > NO_ERROR else "grows from none"
    elif grown < 1 / LEVEL_GROWTH:
        change = f"falls {1 / grown:.3g}-fold" if last > NO_ERROR else "falls to none"
    else:
        change = "is level"
    # A change of the mean may come from one prompt.
    alike = sum((growth(row, found.steps) > 1) == (grown > 1) for row in found.error)
    seen = "" if change == "is level" else f", in {alike} of {counted(found.prompts, 'prompt')}"
    largest = int(np.argmax(curve))
    return (
        f"error against step: {change} (first fifth {first:.2e}, last {last:.2e}{seen}); "
        f"largest {curve[largest]:.2e} at step {found.steps[largest]}"
    )


def _notes(quantized: Fidelity, control: Fidelity) -> list[str]:
    notes = []
    for name, found in (("quantized", quantized), ("control", control)):
        if equal := int(np.sum(found.psnr >= MOST_PSNR)):
            notes.append(
                f"{name}: {equal} of {counted(found.prompts, 'picture')} equal full precision's and count as "
                f"{MOST_PSNR:.1f} dB"
            )
    if control.prompts < quantized.prompts:
        few = counted(control.prompts, "prompt")
        notes.append(f"control: of the first {few} alone, as quantized is far from it")
    if quantized.prompts < FEW_PROMPTS:
        few = counted(quantized.prompts, "prompt")
        return [*notes, f"only {few}: with fewer than {FEW_PROMPTS} the intervals are too narrow to be trusted"]
    if control.prompts < quantized.prompts:
        return notes
    alike = "; ".join(TITLES[name].title for name in quantized.values() if not _beyond(name, quantized, control))
    if alike:
        notes.append(f"not beyond the noise floor (paired by prompt, {LEVEL:.0%}): {alike}")
    return notes


def _beyond(name: str, quantized: Fidelity, control: Fidelity) -> bool:
    """Whether the quantized model is significantly worse than the control, paired by prompt."""
    better, worse = (found.values()[name] for found in (quantized, control))
    if not TITLES[name].higher:
        better, worse = worse, better
    return bootstrap_difference(better, worse).high < 0


def sets_text(found: Mapping[str, SetDistance], with_what: str) -> str:
    """Lines on distances of sets, and their notes; '' where there are none."""
    lines = [f"the whole set of pictures against {with_what} [{LEVEL:.0%} interval]"] if found else []
    for name, distance in found.items():
        own = TITLES[name]
        value = cell(own.form, Interval(distance.value, distance.low, distance.high))
        lines.append(f"{own.label}: {value}; {distance.text}")
    lines += [f"note: {note}" for note in sets_notes(found)]
    return "".join(f"{line}\n" for line in lines)


def sets_notes(found: Mapping[str, SetDistance]) -> list[str]:
    """What a reader of distances of sets must know."""
    return [f"{name}: {note}" for name, distance in found.items() for note in distance.notes]


def repeated_note(prompts: Sequence[str]) -> str:
    """A note where several pictures are of one prompt, as intervals take each for a prompt; '' where none are."""
    different = len(set(prompts))
    counts = f"{len(prompts)} pictures of {counted(different, 'different prompt')}"
    narrow = "intervals are over pictures, and too narrow for what other prompts would give"
    return f"{counts}: {narrow}" if different < len(prompts) else ""


def seen_note(seen: int, prompts: int) -> str:
    """A note where ``seen`` of the prompts were used to make the quantized model; '' where none was."""
    what = f"{seen} of {prompts} prompts were calibrated or trained on, and say little of others"
    return f"{what}; evaluate fewer (evaluation.num_images), or other prompts" if seen else ""


def plot_error(path: Path, curves: Mapping[str, Fidelity]) -> None:
    """Plot a curve per label to a PNG: relative output error against step, mean and 95% interval over prompts."""
    # Imported here, as it is slow; a Figure without pyplot needs no display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_yscale("log")
    for number, (label, found) in enumerate(curves.items()):
        _draw_curve(axes, label, found, f"C{number}", "os^Dv"[number % 5])
    if not any(found.error.any() for found in curves.values()):
        axes.text(0.5, 0.5, "no error at any step", ha="center", transform=axes.transAxes)
        axes.tick_params(axis="y", which="both", left=False, labelleft=False)
    prompts = " or ".join(str(n) for n in sorted({found.prompts for found in curves.values()}))
    over = f"mean and {LEVEL:.0%} interval over {prompts} prompts" if prompts != "1" else "one prompt"
    axes.set_title(f"Error of the model's output on matched states, {over}", loc="left", fontsize=10.5)
    axes.set_xlabel("step index (0: pure noise)")
    axes.set_ylabel("relative output error ‖v − v$_q$‖² / ‖v‖²  (log scale)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    first, last = (end(int(end(found.steps)) for found in curves.values()) for end in (min, max))
    axes.set_xlim(first - 0.03 * (last - first) - 0.1, last + 0.03 * (last - first) + 0.1)
    axes.grid(alpha=0.25)
    axes.grid(alpha=0.1, which="minor", axis="y")
    # Below the axes, as it would hide curves within.
    axes.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False)
    _write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _draw_curve(axes: "Axes", label: str, found: Fidelity, color: str, marker: str) -> None:
    intervals = bootstrap_columns(found.error)
    mean, low, high = (np.array([getattr(i, name) for i in intervals]) for name in ("mean", "low", "high"))
    # A log axis has no zero: such points are left out, and intervals that begin at zero begin below the lowest point.
    shown = mean > 0
    if not shown.all():
        label += " (0 where there is no point)" if shown.any() else " (0 at every step)"
    low = np.where(low > 0, low, mean.min(initial=1, where=shown) / 10)
    axes.plot(found.steps, np.where(shown, mean, np.nan), f"{marker}-", color=color, markersize=4, label=label)
    axes.fill_between(found.steps, low, high, where=shown.tolist(), color=color, alpha=0.2, linewidth=0)


def _write(path: Path, save: Callable[[Path], object]) -> None:
    try:
        with replacing(path) as temporary:
            save(temporary)
    except OSError as error:
        raise CalibError(f"{path}: the picture cannot be written ({error.strerror or error})") from None


def save_pictures(folder: Path, pictures: NDArray[Any], first: int = 0) -> None:
    """Write each of ``pictures`` (n, height, width, 3) in [0, 1] as a PNG, 0000.png …, counted from ``first``.

    With the first of all earlier ones are removed.
    """
    for old in folder.glob("[0-9]*.png") if first == 0 else ():
        old.unlink()
    for number, picture in enumerate(pictures, start=first):
        image = Image.fromarray(np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8))
        _write(folder / f"{number:04d}.png", partial(image.save, format="PNG"))


def picture_grid(
    path: Path, references: NDArray[Any], images: NDArray[Any], prompts: Sequence[str], most: int = 8
) -> None:
    """Write a PNG with a column for each of the first ``most`` prompts: full precision, quantized, difference × 5.

    ``references`` and ``images`` are (n, height, width, 3) in [0, 1].
    """
    if not len(references) == len(images) == len(prompts) > 0 or most < 1:
        raise ValueError(f"{len(references)}, {len(images)} pictures and {len(prompts)} prompts make no grid")
    references, images = (pictures[:most].astype(np.float64) for pictures in (references, images))
    rows = {
        "full precision": references,
        "quantized": images,
        f"difference × {AMPLIFIED}": AMPLIFIED * np.abs(references - images),
    }
    width, height = _shown(references.shape[2], references.shape[1])
    size = max(11, width // 20)
    font, gap, line = _font(size), size, round(1.3 * size)
    left = gap + max(round(font.getlength(name)) for name in rows) + gap // 2
    top = gap // 2 + 2 * line + gap // 2
    canvas = Image.new("RGB", (left + len(images) * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, prompt in enumerate(prompts[:most]):
        x = left + column * (width + gap)
        # Captions are aligned to the bottom.
        for place, text in enumerate(reversed(_wrapped(prompt, font, width))):
            draw.text((x, top - gap // 3 - place * line), text, "black", font, anchor="ld")
        for row, pictures in enumerate(rows.values()):
            canvas.paste(_tile(pictures[column], (width, height)), (x, top + row * (height + gap)))
    for row, name in enumerate(rows):
        draw.text((left - gap // 2, top + row * (height + gap) + height // 2), name, "black", font, anchor="rm")
    _write(path, lambda temporary: canvas.save(temporary, format="PNG", optimize=True))


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's font: Pillow's own has neither the accents in emoji names nor Greek."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _shown(width: int, height: int) -> tuple[int, int]:
    """Width and height of a picture in the grid."""
    side = max(width, height)
    factor = -(-SMALLEST // side) if side < SMALLEST else min(1.0, LARGEST / side)
    return max(1, round(width * factor)), max(1, round(height * factor))


def _tile(picture: NDArray[np.float64], size: tuple[int, int]) -> Image.Image:
    pixels = Image.fromarray(np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8))
    return pixels.resize(size, Image.Resampling.NEAREST if size[0] >= pixels.width else Image.Resampling.BOX)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """``text`` in at most two lines of ``width`` pixels, truncated with an ellipsis."""
    words = text.split()
    first = ""
    while words and font.getlength(f"{first} {words[0]}".strip()) <= width:
        first = f"{first} {words.pop(0)}".strip()
    lines = [line for line in (first, " ".join(words)) if line]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line.rstrip()}…"
