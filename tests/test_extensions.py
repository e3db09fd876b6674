"""Options of the user's own: a package on the path and a YAML file each, used from the command line."""

import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

from calib.activations.batches import Batch, StoredStates
from calib.analysis.plan import LayerPlan, Plan
from calib.analysis.trials import TrialCache
from calib.base.errors import ConfigError
from calib.base.files import read_json
from calib.base.targets import bind_target
from calib.dataset.load import load_manifest
from calib.models import emoji
from calib.models.architecture import Architecture, Conditioning
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.model import DiffusionModel, ModelDtype, weights_fingerprint
from calib.quantization import rtn
from calib.quantization.build import quantize
from calib.quantization.checkpoint import load
from calib.quantization.quantizer import Quantized, QuantizerInput

import mlx.core as mx
import numpy as np
import plain_dit
import pytest
from helpers import CHECKOUT, TINY, Outcome, is_one_clear_line, run_in, tiny, well
from mlx import nn
from mlx.utils import tree_flatten
from tiny_models import tiny_transformer

EXAMPLES = CHECKOUT / "tests" / "examples"
CONF = EXAMPLES / "conf"
DATASET = (*TINY, "data_dir=dataset", "timestep_schedule=list", "timestep_schedule.steps=[0,1,3]")


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    """The user's package can be imported, as if it were installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield


def calib(folder: Path, *arguments: str, conf: Path = CONF) -> Outcome:
    return run_in(folder, *arguments, "--config-dir", str(conf))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with statistics of a few layers of the shipped model."""
    folder = tmp_path_factory.mktemp("own")
    taps = "taps.include=['mm_block_3.image.*','x_embedder']"
    well(calib(folder, "collect", *DATASET, taps, "generate_missing=true", "hydra.run.dir=run"))
    return folder


def test_an_option_takes_two_files() -> None:
    """A function and a YAML file; of a model too, whose sampler has its defaults in the same file."""
    for path in CONF.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        (target,) = re.findall(r"_target_: (\S+)", text)
        module, _, name = target.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
    assert {path.parent.name for path in CONF.rglob("*.yaml")} == {
        *("timestep_schedule", "analysis", "quantizer", "model")
    }


def test_a_schedule(folder: Path) -> None:
    given = ("timestep_schedule=last", "timestep_schedule.count=2", "taps.include=['x_embedder']")
    well(calib(folder, "collect", *TINY, *given, "data_dir=dataset", "hydra.run.dir=last"))
    steps = read_json(folder / "last" / "collection_metadata.json")["steps"]
    assert [step["step_index"] for step in steps] == [2, 3]


def test_a_heuristic_that_looks_at_one_layer(folder: Path) -> None:
    well(calib(folder, "analyze", "stats=run", "analysis=by_tails", "report=none", "hydra.run.dir=by_tails"))
    plan, statistics = (read_json(folder / name) for name in ("by_tails/quantization_config.json", STATISTICS))
    assert len(plan) == len(statistics) == 8
    for name, entry in plan.items():
        seen = statistics[name]
        reach = (seen["max"] - seen["min"]) / (seen["percentiles"]["p99"] - seen["percentiles"]["p01"])
        assert entry["suggested_weight_bits"] == (8 if reach > 4 else 4)


STATISTICS = "run/layer_statistics.json"


def test_a_heuristic_over_all_layers_without_sensitivities_measures_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be measured, and no model loaded")

    monkeypatch.setattr(TrialCache, "load", unwanted)
    monkeypatch.setattr(emoji, "_load_weights", unwanted)
    given = ("analysis=widest", "analysis.share=0.5", "report=none")
    for stats in ("run", STATISTICS):
        outcome = well(calib(folder, "analyze", f"stats={stats}", *given, "hydra.run.dir=widest"))
        assert "8 bits for 4 of 8 layers" in outcome.out
        plan = read_json(folder / "widest" / "quantization_config.json")
        statistics = read_json(folder / STATISTICS)
        widths = {n: s["percentiles"]["p99"] - s["percentiles"]["p01"] for n, s in statistics.items()}
        widest = sorted(widths, key=lambda name: -widths[name])[:4]
        assert {name for name, entry in plan.items() if entry["suggested_weight_bits"] == 8} == set(widest)


def test_a_heuristic_over_all_layers_with_sensitivities(folder: Path) -> None:
    few = ("sensitivity.images=1", "sensitivity.steps=1", "sensitivity.group_sizes=[32]", "report=none")
    few += ("sensitivity.method=trials", "sensitivity.of=output")
    well(calib(folder, "analyze", "stats=run", "analysis=fragile", *few, "hydra.run.dir=fragile"))
    (measured,) = (folder / "calibration_cache" / "sensitivity").glob("*.json")
    harm = {name: np.mean(trials["4x32"]) for name, trials in read_json(measured)["weights"].items()}
    fragile = sorted(harm, key=lambda name: -harm[name])[: round(len(harm) / 4)]
    plan = read_json(folder / "fragile" / "quantization_config.json")
    chosen = {name for name, entry in plan.items() if entry["suggested_weight_bits"] == 8}
    assert chosen == {*fragile, "x_embedder"}, "a convolution, which MLX cannot quantize"


def squared_gradients(work: QuantizerInput, batches: Sequence[Batch]) -> dict[str, mx.array]:
    """Σ G² by layer, G pulled back from random directions of the output, one layer after the other."""
    total = {name: mx.zeros(layer.weight.shape) for name, layer in work.layers.items()}
    for name, layer in work.layers.items():
        own = layer.weight

        def output(weight: mx.array, layer: nn.Linear = layer, batch: Batch = batches[0]) -> mx.array:
            layer.weight = weight
            return work.architecture.velocity(batch.x, batch.text, batch.timesteps)

        for number, batch in enumerate(batches):
            v = work.architecture.velocity(batch.x, batch.text, batch.timesteps)
            noise = mx.random.normal(v.shape, key=mx.random.key(number))
            direction = noise / mx.linalg.norm(v.reshape(len(v), -1), axis=1)[:, None, None, None]
            _, (gradient,) = mx.vjp(partial(output, batch=batch), [own], [direction])
            total[name] += mx.square(gradient)
            layer.weight = own
    return total


def test_a_quantizer_with_gradients_does_no_worse_than_rounding_to_nearest(folder: Path, model: DiffusionModel) -> None:
    """By its own measure, Σ G² ΔW², layer by layer; from the command line, as what it makes is saved."""
    bits = ("analysis=uniform", "analysis.weight_bits=2")
    well(calib(folder, "analyze", "stats=run", *bits, "report=none", "hydra.run.dir=uniform"))
    few = ("calibration.images=2", "calibration.steps=2", "report=none", "hydra.run.dir=shrunk")
    well(calib(folder, "quantize", "plan=uniform", "stats=run", "quantizer=shrink", *few))
    saved = load(folder / "shrunk" / "quantized")
    assert saved.about["quantizer"]["name"] == "my_calib.quantizers.shrink"
    given: list[QuantizerInput] = []

    def watched(work: QuantizerInput) -> Quantized:
        given.append(work)
        return rtn.quantize(work, search=False)

    states = StoredStates(folder / "dataset", load_manifest(folder / "dataset"), [0, 1], [0, 3])
    plan = Plan({name: LayerPlan(2, 16) for name in saved.layers})
    nearest, _ = quantize(model, plan, folder / "run" / "activations.h5", watched, states=states)
    (work,) = given
    weighting = squared_gradients(work, [batch() for batch in states.batches(model, 4, mixed=True)])
    losses = {}
    for kind, made in (("shrink", saved), ("rtn", nearest)):
        losses[kind] = np.array(
            [
                mx.sum(weighting[name] * mx.square(layer.weight - made.layers[name].dequantize())).item()
                for name, layer in work.layers.items()
            ]
        )
    assert (losses["shrink"] <= losses["rtn"] * (1 + 1e-5)).all()
    assert losses["shrink"].sum() < 0.9 * losses["rtn"].sum()


@cache
def architecture_of(name: str) -> Architecture:
    if name == "flux":
        return MMDiTArchitecture(tiny_transformer("flux"))
    if name == "emoji":
        return emoji.load().architecture
    return plain_dit.load("plain_dit", ModelDtype.FLOAT32, 1.0, (32, 32)).architecture


LATENTS = {"emoji": (16, 16, 16), "flux": (16, 16, 16), "plain_dit": (8, 8, 4)}
STEPS_OF_ROWS = {"mixed": [900.0, 350.0], "one": [500.0], "row": [500.0]}


@pytest.mark.parametrize("timesteps", STEPS_OF_ROWS)
@pytest.mark.parametrize("which", LATENTS)
def test_gradients_reach_every_layer_and_leave_the_model_as_it_was(which: str, timesteps: str) -> None:
    """Directional derivatives are those of finite differences, of batches of one step, of several, and of one row."""
    architecture, shape = architecture_of(which), LATENTS[which]
    rows = 1 if timesteps == "row" else 2
    random = np.random.RandomState(0)
    width, pooled_width = architecture.text_widths()
    tokens = mx.array(random.randn(rows, 8, width).astype(np.float32))
    pooled = None if pooled_width is None else mx.array(random.randn(rows, pooled_width).astype(np.float32))
    x, text = mx.array(random.randn(rows, *shape).astype(np.float32)), Conditioning(tokens, pooled)
    target, times = mx.array(random.randn(rows, *shape).astype(np.float32)), mx.array(STEPS_OF_ROWS[timesteps])
    mx.eval(times)

    def loss() -> mx.array:
        return mx.mean(target * architecture.velocity(x, text, times))

    before, names = weights_fingerprint(architecture.module), parameters(architecture)
    output = architecture.velocity(x, text, times)
    _, gradients = nn.value_and_grad(architecture.module, loss)()
    found = dict(tree_flatten(gradients))
    assert weights_fingerprint(architecture.module) == before
    assert parameters(architecture) - {ROPE_TABLE} == names - {ROPE_TABLE} and ROPE_TABLE not in found
    assert mx.array_equal(architecture.velocity(x, text, times), output).item()
    directions = {}
    for name, layer in architecture.layers().items():
        gradient = found[f"{architecture.path(name)}.weight"]
        if not name.endswith("text.attn.q_proj"):  # of the last text stream nobody asks
            assert mx.any(gradient != 0).item(), name
        directions[name] = (layer, layer.weight, mx.array(random.randn(*gradient.shape).astype(np.float32)), gradient)
    step, ends = 1e-4, []
    for sign in (1, -1):
        for layer, own, direction, _ in directions.values():
            layer.weight = own + sign * step * direction
        ends.append(loss().item())
        for layer, own, *_ in directions.values():
            layer.weight = own
    slope = sum(mx.sum(direction * gradient).item() for *_, direction, gradient in directions.values())
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=0.02)


#: What FLUX's positions leave on the module, where MLX takes it for a parameter.
ROPE_TABLE = "pre_sdpa_rope.rope_embeddings"


def parameters(architecture: Architecture) -> set[str]:
    return set(dict(tree_flatten(architecture.module.parameters())))


WRONG = """
import numpy as np
from calib.analysis.plan import LayerPlan, Plan

def schedule(n=3): return [0]
def no_steps(num_steps): return None
def fails(num_steps): return [1 // 0]
class Mute(Exception):
    def __str__(self): return 1 // 0
def mute(num_steps): raise Mute
def of_nothing(bits=4): return LayerPlan(4, 8)
def of_both(layer, layers): return LayerPlan(4, 8)
def seven(layer): return LayerPlan(7, 8)
def numpy_bits(layer): return LayerPlan(np.int64(4), np.int64(8), group_size=np.int64(32))
def one_less(layers): return {name: LayerPlan(4, 8) for name in list(layers)[1:]}
def measured(layers, sensitivities): return None
def nothing(weights): return None
def array(work): return np.zeros(3)
def one_range(observed): return observed.low.min(), observed.high.max()
def no_group(observed): raise ValueError("no group")
def prompts(): return "red apple"
def subset(image_ids): return image_ids
def twice(image_ids, num_images): return [image_ids[0]] * 2
def by_latents(image_ids, num_images, latents): return latents(image_ids).argmax(axis=0) + 0.5
def model(name): return None
"""
#: Of each way of finding out, one; all answers are in tests/test_options.py.
OPTIONS = {
    "timestep_schedule": {
        "schedule": "must take num_steps; this one takes n",
        "no_steps": "must return step indices, 0 to 4 (sampler.num_steps); returned None",
        "fails": "raised ZeroDivisionError: ",
        "mute": "raised Mute (",
    },
    "analysis": {
        "of_nothing": "a heuristic must take layer, or layers, or layers and sensitivities; this one takes bits",
        "of_both": "a heuristic must take layer, or layers, or layers and sensitivities; this one takes layer, layers",
        "seven": "must return a LayerPlan for each layer; a made-up layer has suggested_weight_bits=7: MLX quantizes",
        "one_less": "must return a Plan of every layer; it lacks context_embedder",
        "measured": "must return a Plan of every layer; returned None",
    },
    "quantizer": {
        "nothing": "must take work; this one takes weights",
        "array": "must return a Quantized of work.layers, an empty one for none; returned ndarray",
    },
    "ranges": {
        "one_range": "must return StepRanges, from step 0 on; returned tuple",
        "no_group": "raised ValueError: no group (",
    },
    "prompts": {"prompts": "must return a list of texts; returned str"},
    "subset": {
        "subset": "must take image_ids and num_images; this one takes image_ids",
        "twice": "must return ids of those given, each once; returned 0 more than once",
        "by_latents": "must return ids of those given, each once; returned ",
    },
    "model": {"model": "must take shift and image_size; this one takes name"},
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with options that do not do what they should."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "wrong_options.py").write_text(WRONG)
    for group, options in {**OPTIONS, "analysis": [*OPTIONS["analysis"], "numpy_bits"]}.items():
        (folder / "conf" / group).mkdir(parents=True)
        for name in options:
            more = "name: model\n" if group == "model" else ""
            (folder / "conf" / group / f"{name}.yaml").write_text(f"_target_: wrong_options.{name}\n{more}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder / "conf"


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, names in OPTIONS.items() for name in names])
def test_a_wrong_option_ends_in_one_line_before_anything_is_drawn(
    group: str, name: str, wrong: Path, tmp_path: Path
) -> None:
    line = is_one_clear_line(calib(tmp_path, *tiny(f"{group}={name}"), conf=wrong))
    assert line.startswith(f"{group}._target_=wrong_options.{name}: {OPTIONS[group][name]}")
    assert not list(tmp_path.iterdir())


def test_its_traceback_is_there_for_the_asking(wrong: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    first, *_, raised, line = calib(tmp_path, *TINY, "timestep_schedule=fails", conf=wrong).err.splitlines()
    assert first.startswith("Traceback") and raised.startswith("ZeroDivisionError: ")
    assert line.startswith("calib: timestep_schedule._target_=wrong_options.fails: raised ZeroDivisionError: ")


def test_numpys_integers_are_integers(wrong: Path, folder: Path) -> None:
    well(calib(folder, "analyze", "stats=run", "analysis=numpy_bits", "report=none", "hydra.run.dir=np", conf=wrong))
    for entry in read_json(folder / "np" / "quantization_config.json").values():
        found = {key: entry[key] for key in ("suggested_weight_bits", "suggested_activation_bits", "group_size")}
        assert list(found.values()) == [4, 8, 32]


def test_a_function_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError) as error:
        bind_target("timestep_schedule", {"_target_": "my_calib.schedules.first"}, given=("num_steps",))
    assert str(error.value).startswith("timestep_schedule._target_=my_calib.schedules.first: names no function (")


def test_the_document_quotes_the_examples_as_they_are() -> None:
    """A block of docs/ARCHITECTURE.md that is marked with a file's name is part of that file; no example is missing."""
    text = (CHECKOUT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^```\w+ (tests/\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for name, lines in quoted:
        assert lines.strip() and lines in (CHECKOUT / name).read_text(encoding="utf-8"), f"{name}:\n{lines}"
    files = [*CONF.rglob("*.yaml"), *(path for path in (EXAMPLES / "my_calib").glob("*.py") if path.stem != "__init__")]
    assert {str(path.relative_to(CHECKOUT)) for path in files} | {"tests/plain_dit.py"} == {name for name, _ in quoted}


def test_edited_code_runs_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of an option of the user's own counts: a run that it made is not complete once it has changed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "conf" / "analysis").mkdir(parents=True)
    (tmp_path / "conf" / "analysis" / "edited.yaml").write_text("_target_: edited_option.plan\n")
    command = ("analyze", "stats=run", "analysis=edited", "report=none", "hydra.run.dir=edited")
    for bits, complete in ((4, False), (4, True), (6, False)):
        source = f"from calib.analysis.plan import LayerPlan\n\n\ndef plan(layer): return LayerPlan({bits}, 8)\n"
        (tmp_path / "edited_option.py").write_text(
            source + "#" * bits
        )  # compiled anew for its size, in the same second
        sys.modules.pop("edited_option", None)
        importlib.invalidate_caches()
        out = well(calib(folder, *command, conf=tmp_path / "conf")).out
        assert ("Already complete" in out) == complete
        entries = read_json(folder / "edited" / "quantization_config.json").values()
        assert {entry["suggested_weight_bits"] for entry in entries} == {bits}


HINTS = {
    "timestep_schedule=lats": "no such option. Did you mean 'last'",
    "timestep_schedule=last timestep_schedule.counts=3": "Did you mean 'timestep_schedule.count'?",
    "timestep_schedule=last calibration.imgs=3": "Did you mean 'calibration.images'",
    "timestep_schedule=last analisys.share=1": "no such key. Did you mean 'analysis",
}


@pytest.mark.parametrize("overrides", HINTS)
def test_hints_know_options_of_the_users_own(overrides: str, tmp_path: Path) -> None:
    assert HINTS[overrides] in is_one_clear_line(calib(tmp_path, *overrides.split()))


def test_heuristic_that_divides_is_not_refused_for_made_up_layers(folder: Path, tmp_path: Path) -> None:
    """All made-up layers are alike, so that a spread over layers is 0."""
    (tmp_path / "dividing_option.py").write_text(
        "from calib.analysis.plan import LayerPlan, Plan\n\n\n"
        "def plan(layers):\n"
        "    ranges = [layer.range for layer in layers.values()]\n"
        "    scale = 1 / (max(ranges) - min(ranges))\n"
        "    return Plan({n: LayerPlan(8 if layer.range * scale > 0.5 else 4, 8) for n, layer in layers.items()})\n"
    )
    (tmp_path / "conf" / "analysis").mkdir(parents=True)
    (tmp_path / "conf" / "analysis" / "dividing.yaml").write_text("_target_: dividing_option.plan\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        given = ("stats=run", "analysis=dividing", "report=none", "hydra.run.dir=dividing")
        well(calib(folder, "analyze", *given, conf=tmp_path / "conf"))
    bits = {e["suggested_weight_bits"] for e in read_json(folder / "dividing" / "quantization_config.json").values()}
    assert bits == {4, 8}
