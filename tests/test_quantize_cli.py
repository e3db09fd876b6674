"""From statistics to a measured model by the command line: what it makes, and one clear line for what cannot be."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calib.activations.batches import StoredStates
from calib.analysis.plan_file import read_plan
from calib.analysis.steps import read_steps
from calib.base.errors import CalibError
from calib.cli.compose import plain
from calib.cli.conf import CONF
from calib.dataset.load import load_manifest
from calib.quantization.checkpoint import load
from calib.runs.pages.run import run_page
from calib.runs.record import read_run
from calib.stages.build import build
from calib.stages.quantize import spare_prompts
from calib.stages.settings import Settings
from calib.stages.stages import check_stage

import numpy as np
import pytest
from damage import restated, set_states
from helpers import (
    TINY,
    Outcome,
    contents,
    everything,
    flip_byte,
    is_one_clear_line,
    lines_of,
    run_here,
    run_in,
    temporaries,
    tiny,
)
from hydra import compose, initialize_config_dir

#: The least that sensitivities can be measured on.
LEAST = ("sensitivity.images=1", "sensitivity.steps=1", "sensitivity.group_sizes=[64]")
#: Of the last block and around it: nine layers.
FEW = "taps.include=['x_embedder','mm_block_3.image.*','final_layer.linear']"

Calib = Callable[..., Outcome]


@pytest.fixture
def calib(folder: Path, capsys: pytest.CaptureFixture[str], tiny_run: Path) -> Calib:
    """``calib`` in an empty folder, on the shared run's dataset and with its cache; ``run`` is the run directory."""
    shared = (f"data_dir={tiny_run.parent / 'dataset'}", f"cache_dir={tiny_run.parent / 'calibration_cache'}")

    def call(stage: str, *more: str, run: str = "run") -> Outcome:
        given = [argument for argument in shared if argument.split("=")[0] not in {m.split("=")[0] for m in more}]
        return run_here([stage, *tiny(*given, f"hydra.run.dir={run}", *more)], capsys)

    return call


@pytest.fixture
def plan(folder: Path, tiny_run: Path) -> Path:
    """The shared run's plan, by itself."""
    (folder / "plan").mkdir()
    for name in ("quantization_config.json", "timestep_config.json"):
        shutil.copy(tiny_run / name, folder / "plan")
    return folder / "plan"


@pytest.fixture(scope="module")
def few(tiny_run: Path) -> Path:
    """Statistics of a few layers, collected into the shared cache."""
    outcome = run_in(tiny_run.parent, "collect", *TINY, "data_dir=dataset", FEW, "hydra.run.dir=few")
    assert outcome.status == 0, outcome.err
    return tiny_run.parent / "few"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rewritten(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A damage: one of the plan's files changed."""

    def damage(plan: Path) -> None:
        document = read(plan / name)
        change(document)
        (plan / name).write_text(json.dumps(document))

    return damage


def layer(**changes: Any) -> Callable[[Path], None]:
    """A damage: other keys of one layer of the plan; None takes one away."""

    def change(document: dict[str, Any]) -> None:
        entry = document["mm_block_1.image.mlp.fc1"]
        entry.update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del entry[key]

    return rewritten("quantization_config.json", change)


def timesteps(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return rewritten("timestep_config.json", change)


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda plan: (plan / name).write_text(content) and None


def replaced(old: str, new: str) -> Callable[[Path], None]:
    """A damage: the first ``old`` in the plan's text becomes ``new``."""

    def damage(plan: Path) -> None:
        path = plan / "quantization_config.json"
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new, 1))

    return damage


def check_failed_run(run: Path, message: str) -> None:
    """It says why it failed, and made nothing else."""
    status = read(run / "status.json")
    assert status["state"] == "failed"
    assert message in status["error"]
    assert {path.name for path in run.iterdir()} == {
        *(".hydra", ".lock", "config.resolved.yaml", "env.json", "run.log", "status.json")
    }


# The whole way


def test_from_statistics_to_a_measured_model_within_a_budget(
    calib: Calib, few: Path, folder: Path, tmp_path: Path
) -> None:
    # A cache of its own: what is measured here is not there already.
    given = [f"stats={few}", "analysis=allocate", "analysis.average_bits=4", f"cache_dir={tmp_path / 'cache'}", *LEAST]
    given.append("analysis.average_activation_bits=8")
    outcome = calib("analyze", *given, "ranges=grouped", run="plan")
    assert outcome.status == 0, outcome.err
    assert "gradients: " in outcome.err
    assert "predicted PSNR = " in outcome.out and "of a squared error before step 0" in outcome.out
    metrics = read(folder / "plan" / "metrics.json")
    predicted, average = metrics["predicted_psnr"], metrics["average_activation_bits"]
    bits = read(folder / "plan" / "quantization_config.json")
    errors = [entry["sensitivity"] for entry in bits.values() if "sensitivity" in entry]
    assert predicted < metrics["predicted_weights_psnr"] == pytest.approx(-10 * np.log10(sum(errors)))
    by_step = read_steps(folder / "plan" / "timestep_config.json").step_bits
    assert 7.5 < average <= 8 and by_step.keys() == bits.keys()
    assert any(len(set(own)) > 1 for own in by_step.values()), "bits follow the step"
    assert len({entry["suggested_weight_bits"] for entry in bits.values()}) > 1
    assert {entry["group_size"] for name, entry in bits.items() if name != "x_embedder"} == {64}

    outcome = calib("analyze", *given[:2], "analysis.average_bits=5", *given[3:], run="more")
    assert (outcome.status, outcome.err) == (0, ""), "another budget takes no second"
    assert "loaded emoji" not in (folder / "more" / "run.log").read_text()
    more = read(folder / "more" / "quantization_config.json")
    total = [sum(entry["suggested_weight_bits"] for entry in p.values()) for p in (bits, more)]
    assert total[0] < total[1]

    outcome = calib("quantize", "plan=plan", "quantizer=gptq", "calibration.images=1", run="quantized")
    assert outcome.status == 0, outcome.err
    notes = [line for line in lines_of(outcome.err) if "gptq" in line]
    assert len(notes) == 1 and " layers lose less than by rounding to nearest" in notes[0]
    made = load(folder / "quantized" / "quantized")
    planned = {name: entry["suggested_weight_bits"] for name, entry in bits.items() if name != "x_embedder"}
    assert {name: packed.bits for name, packed in made.layers.items()} == planned
    assert {name: rule.bits for name, rule in made.inputs.items()} == by_step
    metrics = read(folder / "quantized" / "metrics.json")
    assert 3.5 < metrics["average_weight_bits"] <= 4
    assert metrics["quantized_bytes"] == made.size().nbytes
    size = f"{len(planned)} layers at {metrics['average_weight_bits']:.2f} bits a weight"
    assert size in outcome.out
    assert f"{len(bits)} layers with quantized inputs, {average:.2f} bits a number that layers read" in outcome.out
    assert metrics["average_activation_bits"] == average
    for name in ("quantization_config.json", "timestep_config.json"):
        assert read(folder / "quantized" / name) == read(folder / "plan" / name), "a run directory says all of it"

    outcome = calib("evaluate", "plan=quantized", run="evaluated")
    assert outcome.status == 0, outcome.err
    assert "draw control" not in outcome.err, "the noise floor is measured once"
    found = read(folder / "evaluated" / "evaluation.json")
    assert len(found["prompts"]) == len(found["quantized"]["psnr"]) == 2
    assert found["quantized"]["steps"] == [0, 3]
    metrics = read(folder / "evaluated" / "metrics.json")
    assert metrics["output_error"] == pytest.approx(np.mean(found["quantized"]["error"]))
    assert metrics["psnr"] == pytest.approx(np.mean(found["quantized"]["psnr"]))
    assert metrics["predicted_psnr"] == predicted and metrics["average_activation_bits"] == average
    text = (folder / "evaluated" / "evaluation.txt").read_text()
    assert f"rounded to nearest: PSNR {predicted:.2f} dB, " in text and f"inputs: {average:.2f} bits" in text
    assert "Bits of inputs by step" in run_page(folder / "plan")
    assert 0 < metrics["control_output_error"] < metrics["output_error"] and metrics["psnr"] > 25
    assert temporaries(folder) == set()


def test_prompts_of_evaluation_are_not_those_of_calibration(tiny_run: Path) -> None:
    (evaluation,) = tiny_run.parent.glob("emoji-evaluation-*")
    drawn, calibration = (load_manifest(d).images.values() for d in (evaluation, tiny_run.parent / "dataset"))
    assert {entry.prompt for entry in drawn}.isdisjoint(entry.prompt for entry in calibration)
    assert {entry.seed for entry in drawn}.isdisjoint(entry.seed for entry in calibration)


def test_a_complete_model_is_not_made_again_but_that_of_another_plan_is(calib: Calib, plan: Path, folder: Path) -> None:
    assert calib("quantize", "plan=plan").status == 0
    before = contents(folder / "run")
    outcome = calib("quantize", "plan=plan")
    assert (outcome.status, outcome.out) == (0, "Already complete: run\n")
    assert contents(folder / "run") == before
    layer(suggested_weight_bits=2)(plan)
    outcome = calib("quantize", "plan=plan/quantization_config.json")
    assert outcome.status == 0 and "Quantized model: " in outcome.out
    assert load(folder / "run" / "quantized").layers["mm_block_1.image.mlp.fc1"].bits == 2
    assert sorted(path.name for path in (folder / "run").iterdir() if path.name.startswith(".")) == [".hydra", ".lock"]


@pytest.fixture(scope="module")
def few_plan(few: Path) -> Path:
    """A plan of those few layers; it lies apart from their statistics, and says where they are."""
    given = [f"stats={few}", "analysis=uniform", "data_dir=dataset", "hydra.run.dir=few_plan"]
    outcome = run_in(few.parent, "analyze", *TINY, *given)
    assert outcome.status == 0, outcome.err
    return few.parent / "few_plan"


@pytest.mark.parametrize("quantizer", ["rtn", "percentile", "smooth", "gptq"])
def test_every_quantizer_finds_its_statistics_by_the_plan(
    calib: Calib, few_plan: Path, folder: Path, quantizer: str
) -> None:
    given = [f"plan={few_plan}", f"quantizer={quantizer}", "calibration.images=1", "calibration.steps=2"]
    outcome = calib("quantize", *given)
    assert outcome.status == 0, outcome.err
    made = load(folder / "run" / "quantized")
    assert made.about["quantizer"]["name"] == quantizer
    assert made.about["ranges"] == {"name": "static", "parameters": {}}
    assert {packed.bits for packed in made.layers.values()} == {4}
    planned = read_steps(few_plan / "timestep_config.json").ranges
    same = {name: rule.ranges == planned[name] for name, rule in made.inputs.items()}
    assert all(same.values()) is (quantizer in ("rtn", "gptq")), "percentile and smooth have ranges of their own"


# Plans


Damage = Callable[[Path], object]
UNKNOWN = ("mm_block_7.image.mlp.fc1", "mm_block_8.image.mlp.fc1")
BEYOND = {"from_step": [0, 4], "low": [0, 0], "high": [1, 1]}
PLANS: dict[str, tuple[Damage, int, Sequence[str]]] = {
    "another model": (
        timesteps(lambda c: c.update(model="sd3_medium")),
        2,
        ["plan=plan", "made for model=sd3_medium, not emoji", "set model=sd3_medium"],
    ),
    "unknown layers": (
        rewritten(
            "quantization_config.json",
            lambda c: c.update({f"mm_block_{i}.image.mlp.fc1": c["x_embedder"] for i in (7, 8)}),
        ),
        1,
        ["plan/quantization_config.json", "no layer 'mm_block_7.image.mlp.fc1' and 1 more", "Did you mean"],
    ),
    "7 bits": (
        layer(suggested_weight_bits=7),
        1,
        ["'mm_block_1.image.mlp.fc1'", "suggested_weight_bits=7", "(2, 3, 4, 5, 6, 8)"],
    ),
    "16 bits": (layer(suggested_weight_bits=16), 1, ["suggested_weight_bits=16"]),
    "bits with a point": (layer(suggested_weight_bits=8.0), 1, ["suggested_weight_bits=8.0"]),
    "bits as text": (layer(suggested_weight_bits="4"), 1, ['suggested_weight_bits="4": must be an integer']),
    "groups of 16": (layer(group_size=16), 1, ["group_size=16", "(32, 64, 128)"]),
    "groups with a point": (layer(group_size=64.0), 1, ["group_size=64.0"]),
    "one activation bit": (layer(suggested_activation_bits=1), 1, ["suggested_activation_bits=1", "2 to 16"]),
    "half a bit": (layer(suggested_activation_bits=4.5), 1, ["suggested_activation_bits=4.5"]),
    "percentiles that fall": (
        layer(use_percentile_clipping=True, clip_percentile=[99, 1]),
        1,
        ["clip_percentile=[99.0, 1.0]", "must ascend"],
    ),
    "one percentile": (
        layer(use_percentile_clipping=True, clip_percentile=[99]),
        1,
        ["'mm_block_1.image.mlp.fc1' has clip_percentile=[99]: must be two numbers"],
    ),
    "a key that is missing": (
        layer(suggested_activation_bits=None),
        1,
        ["lacks suggested_activation_bits", "calib analyze"],
    ),
    "a layer that is none": (
        rewritten("quantization_config.json", lambda c: c.update(x_embedder=3)),
        1,
        ["'x_embedder' is 3: must be an object"],
    ),
    "another key": (layer(weight_bits=4), 1, ["fc1' has weight_bits", "Did you mean 'suggested_weight_bits'"]),
    "text for a flag": (layer(use_percentile_clipping="no"), 1, ['clipping="no": must be true or false']),
    "a number for a flag": (layer(sensitive=0), 1, ["'mm_block_1.image.mlp.fc1' has sensitive=0: must be true or"]),
    "bits that are true": (layer(suggested_activation_bits=True), 1, ["suggested_activation_bits=true"]),
    "a layer twice": (replaced("{", '{"x_embedder": {},'), 1, ["has 'x_embedder' twice; keep one"]),
    "a key twice": (replaced('"reason"', '"group_size": 32, "reason"'), 1, ["has 'group_size' twice"]),
    "another key of a phase": (
        timesteps(lambda c: c["phases"]["mid"].update(bits={})),
        1,
        ["timestep_config.json: phase 'mid' has bits", "activation_bits"],
    ),
    "a phase's bits of another layer": (
        timesteps(lambda c: c["phases"]["mid"]["activation_bits"].update(x_embeder=8)),
        1,
        ["timestep_config.json: has layer 'x_embeder'", "Did you mean 'x_embedder'"],
    ),
    "cut short": (
        lambda d: (d / "quantization_config.json").write_text('{"x_embedder": {'),
        1,
        ["plan/quantization_config.json: not valid JSON"],
    ),
    "no layers": (text("quantization_config.json", "{}"), 1, ["holds no layers", "calib analyze"]),
    "a list": (text("quantization_config.json", "[]"), 1, ["holds no layers"]),
    "not there": (shutil.rmtree, 2, ["plan=plan", "calib analyze makes one"]),
    "a folder without it": (
        lambda d: (d / "quantization_config.json").unlink(),
        2,
        ["plan=plan: no quantization_config.json there", "calib analyze makes one"],
    ),
    "steps cut short": (text("timestep_config.json", '{"num_steps"'), 1, ["plan/timestep_config.json: not valid JSON"]),
    "no timesteps": (
        timesteps(lambda c: c.pop("timesteps")),
        1,
        ["plan/timestep_config.json: lacks or garbles 'timesteps'", "calib analyze"],
    ),
    "a phase without steps": (
        timesteps(lambda c: c["phases"]["mid"].update(steps=[])),
        1,
        ["plan/timestep_config.json: lacks or garbles"],
    ),
    "99 bits in a phase": (
        timesteps(lambda c: c["phases"]["mid"]["activation_bits"].update(x_embedder=99)),
        1,
        ["plan/timestep_config.json: lacks or garbles 99 bits of x_embedder"],
    ),
    "a range beyond the steps": (
        timesteps(
            lambda c: c["activation_ranges"].update(x_embedder={"from_step": [0, 4], "low": [0, 0], "high": [1, 1]})
        ),
        1,
        ["activation_ranges of 'x_embedder'", "the last of 4 steps is 3"],
    ),
    "a range without numbers": (
        timesteps(lambda c: c["activation_ranges"]["x_embedder"].update(low=[None])),
        1,
        ["activation_ranges of 'x_embedder'", "not a finite number"],
    ),
}


@pytest.fixture(scope="module")
def wanted() -> Settings:
    """What ``calib quantize plan=plan`` is asked to do."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return build(plain(compose("config", overrides=["stage=quantize", "plan=plan", *TINY])))


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_that_cannot_be_applied_is_refused(wanted: Settings, plan: Path, case: str) -> None:
    damage, status, words = PLANS[case]
    damage(plan)
    with pytest.raises(CalibError) as error:
        check_stage(wanted)
    assert error.value.exit_status == status
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_plan_may_have_comments_and_a_byte_order_mark(plan: Path) -> None:
    path = plan / "quantization_config.json"
    before = read_plan(path)
    layer(_why="too wide", _keys=[1])(plan)
    rewritten(path.name, lambda document: document.update(_comment={"by": "me"}))(plan)
    path.write_text("\ufeff" + path.read_text())
    assert read_plan(path) == before


def test_a_plan_is_refused_before_anything_is_made(calib: Calib, plan: Path, folder: Path) -> None:
    damage, status, words = PLANS["no layers"]
    damage(plan)
    before = everything(folder)
    line = is_one_clear_line(calib("quantize", "plan=plan"), status)
    assert all(word in line for word in words)
    assert everything(folder) == before


def test_without_a_plan_the_key_is_named(calib: Calib, folder: Path) -> None:
    assert "plan is not set: name a run directory or a quantization_config.json" in is_one_clear_line(calib("quantize"))
    assert "plan is not set: name the run directory of calib quantize" in is_one_clear_line(calib("evaluate"))
    assert everything(folder) == []


def test_a_plan_for_other_weights_is_told_when_they_are_known(calib: Calib, plan: Path, folder: Path) -> None:
    timesteps(lambda c: c.update(fingerprint="0123456789abcdef"))(plan)
    line = is_one_clear_line(calib("quantize", "plan=plan"), status=1)
    assert "its statistics are of other weights (0123456789abcdef, not " in line
    check_failed_run(folder / "run", "other weights")


def test_weights_that_a_layer_of_a_plan_lacks_are_noted(calib: Calib, plan: Path, folder: Path) -> None:
    layer(group_size=128)(plan)
    outcome = calib("quantize", "plan=plan")
    assert outcome.status == 0
    assert lines_of(outcome.err) == ["note: x_embedder is no linear layer, MLX cannot quantize it; it stays at 16 bits"]
    assert load(folder / "run" / "quantized").layers["mm_block_1.image.mlp.fc1"].group_size == 128


@pytest.mark.parametrize("quantizer", ["smooth", "percentile", "gptq"])
def test_a_quantizer_without_statistics_says_what_to_name(
    calib: Calib, plan: Path, few: Path, folder: Path, quantizer: str
) -> None:
    (plan / "timestep_config.json").unlink()
    outcome = calib("quantize", "plan=plan", f"quantizer={quantizer}")
    *notes, line = lines_of(outcome.err)
    assert outcome.status == 1
    assert all(note.startswith("note: ") for note in notes)
    assert "stats=DIR" in line if quantizer == "gptq" else "calib collect" in line
    check_failed_run(folder / "run", line)


def test_a_dataset_of_other_texts_is_not_replayed(calib: Calib, few: Path, few_plan: Path, folder: Path) -> None:
    shutil.copytree(few.parent / "dataset", folder / "copy")
    manifest = read(folder / "copy" / "manifest.json")
    (folder / "copy" / "manifest.json").write_text(json.dumps(manifest | {"text_encoders": "clip"}))
    given = (f"plan={few_plan}", f"stats={few}", "data_dir=copy", "quantizer=gptq", "calibration.images=1")
    line = is_one_clear_line(calib("quantize", *given), status=1)
    assert "copy: its prompts were encoded by clip, not " in line


QUANTIZERS = [
    ("quantize", ["quantizer=gptq", "quantizer.damping=-1"], "quantizer.damping=-1"),
    ("run", ["quantizer=gptq", "quantizer.memory_gb=0"], "quantizer.memory_gb=0"),
    ("quantize", ["quantizer=percentile", "quantizer.low=60", "quantizer.high=40"], "quantizer.low=60"),
    ("run", ["quantizer=smooth", "quantizer.alpha=2"], "quantizer.alpha=2"),
]


@pytest.mark.parametrize(("stage", "given", "words"), QUANTIZERS)
def test_impossible_parameters_of_a_quantizer_are_told_before_anything_is_made(
    calib: Calib, plan: Path, folder: Path, stage: str, given: Sequence[str], words: str
) -> None:
    before = everything(folder)
    more = ["plan=plan"] if stage == "quantize" else ["data_dir=dataset"]
    assert words in is_one_clear_line(calib(stage, *more, *given))
    assert everything(folder) == before


def test_a_disk_with_no_room_for_the_model_is_told(calib: Calib, plan: Path, small_disk: Path) -> None:
    line = lines_of(calib("quantize", "plan=plan", run="disk/run").err)[-1]
    assert "disk/run/quantized" in line and "No space left on device" in line
    assert not (small_disk / "run" / "quantized").exists()
    assert read(small_disk / "run" / "status.json")["state"] == "failed"
    assert not [path for path in (small_disk / "run").iterdir() if path.name.startswith(".quantized")]


# Plans of little


def test_a_plan_from_layer_statistics_alone_is_quantized_and_evaluated(
    calib: Calib, tiny_run: Path, folder: Path
) -> None:
    """It says nothing of steps and ranges: the weights are quantized, the inputs stay, and that is told."""
    shutil.copy(tiny_run / "layer_statistics.json", folder / "statistics.json")
    assert calib("analyze", "stats=statistics.json", run="plan").status == 0
    outcome = calib("quantize", "plan=plan", run="quantized")
    assert outcome.status == 0, outcome.err
    assert any("61 layers have no activation ranges" in line for line in lines_of(outcome.err))
    assert "0 layers with quantized inputs" in outcome.out
    outcome = calib("evaluate", "plan=quantized")
    assert outcome.status == 0, outcome.err
    whole, own = (read(run / "metrics.json") for run in (tiny_run, folder / "run"))
    assert own["output_error"] < whole["output_error"], "the same weights, and inputs as they are"


@pytest.mark.parametrize("taps", ["taps=all", pytest.param("taps=block", marks=pytest.mark.slow)])
def test_plans_with_blocks_are_quantized_and_evaluated(calib: Calib, folder: Path, taps: str) -> None:
    """Blocks are seen and planned, and have no weights of their own."""
    include = ["taps.include=['mm_block_1','mm_block_2.image.mlp.*']"] if taps == "taps=all" else []
    assert calib("collect", taps, *include, run="collected").status == 0
    assert calib("analyze", "stats=collected", run="plan").status == 0
    assert "mm_block_1" in read(folder / "plan" / "quantization_config.json")
    outcome = calib("quantize", "plan=plan", run="quantized")
    assert outcome.status == 0, outcome.err
    made = load(folder / "quantized" / "quantized")
    layers = {"mm_block_2.image.mlp.fc1", "mm_block_2.image.mlp.fc2"} if taps == "taps=all" else set()
    assert set(made.layers) == set(made.inputs) == layers
    if not layers:
        outcome = calib("evaluate", "plan=quantized")
        assert outcome.status == 0, outcome.err


def test_steps_that_were_not_collected_lie_between_those_that_were(calib: Calib, folder: Path) -> None:
    given = ["timestep_schedule=list", "timestep_schedule.steps=[0,3,4]", FEW]
    assert calib("collect", *given, run="collected").status == 0
    assert calib("analyze", "stats=collected", "ranges=per_step", "phase_bits=false", run="plan").status == 0
    config = read(folder / "plan" / "timestep_config.json")
    assert config["num_steps"] == len(config["timesteps"]) == 4
    assert config["timesteps"] == sorted(config["timesteps"], reverse=True)
    for name, ranges in read_steps(folder / "plan" / "timestep_config.json").ranges.items():
        first, last = ranges.at(0), ranges.at(3)
        for step in (1, 2):
            expected = [a + step / 3 * (b - a) for a, b in zip(first, last, strict=True)]
            assert ranges.at(step) == pytest.approx(expected), name
    outcome = calib("quantize", "plan=plan", run="quantized")
    assert outcome.status == 0, outcome.err


@pytest.mark.parametrize("steps", [1, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (2, 3))])
def test_trajectories_of_a_few_steps_lack_phases(calib: Calib, folder: Path, steps: int) -> None:
    """Of one step there is no early and no late phase, of two no middle one."""
    given = [f"sampler.num_steps={steps}", "timestep_schedule=all", "data_dir=dataset", "evaluation=none", FEW]
    outcome = calib("run", *given)
    assert outcome.status == 0, outcome.err
    assert re.fullmatch(r"In short: \S+ bits a weight, [^;]*%\)", outcome.out.splitlines()[-2]), "nothing is drawn"
    phases = read_steps(folder / "run" / "timestep_config.json").phases
    assert [step for first, last in phases.values() for step in range(first, last + 1)] == list(range(steps))
    assert len(load(folder / "run" / "quantized").timesteps) == steps


def test_activations_of_the_finished_latent_alone_make_no_ranges(calib: Calib, folder: Path) -> None:
    assert calib("collect", "timestep_schedule=list", "timestep_schedule.steps=[4]", FEW, run="collected").status == 0
    line = is_one_clear_line(calib("analyze", "stats=collected"), status=1)
    assert "no finite values at a step that the sampler feeds to the model" in line
    check_failed_run(folder / "run", "no finite values")
    before = everything(folder)
    line = is_one_clear_line(calib("analyze", "stats=collected", "analysis=allocate", run="other"), status=1)
    assert line.startswith("collected: only the finished latent was collected")
    assert everything(folder) == before


# Sensitivities


HEURISTICS = [
    ("run", ["analysis=allocate", "analysis.average_bits=2.4"], ("analysis.average_bits=2.4", "must be 2.5 or more")),
    ("analyze", ["analysis=allocate", "analysis.average_bits=1"], ("analysis.average_bits=1", "or more")),
    ("analyze", ["analysis=allocate", "analysis.megabytes=-3"], ("analysis.megabytes=-3", "or more")),
    ("run", ["analysis=allocate", "analysis.average_bits=4", "analysis.megabytes=3"], ("average_bits=4", "one budget")),
    ("analyze", ["analysis=allocate", "analysis.weight_bits=[7]"], ("analysis.weight_bits=[7]", "2, 3, 4, 5, 6, 8")),
    ("analyze", ["analysis=allocate", "analysis.group_sizes=[16]"], ("analysis.group_sizes=[16]", "32, 64, 128")),
    ("analyze", ["analysis=allocate", "analysis.activation_bits=1"], ("analysis.activation_bits=1", "2 to 16")),
    ("analyze", ["analysis=allocate", "analysis.per_phase=true"], ("analysis.per_phase=True", "sensitivity.of=output")),
    ("run", ["analysis=allocate", "analysis.average_activation_bits=3"], ("average_activation_bits=3", "4 to 16")),
    (
        "analyze",
        ["analysis=allocate", "analysis.average_activation_bits=17"],
        ("average_activation_bits=17", "4 to 16"),
    ),
    ("run", ["analysis=allocate", "analysis.average_activation_bits=six"], ("average_activation_bits=six", "a number")),
    ("run", ["analysis=sensitivity", "analysis.tolerance=0"], ("analysis.tolerance=0", "positive")),
]


@pytest.mark.parametrize(("stage", "given", "words"), HEURISTICS)
def test_impossible_parameters_of_a_heuristic_are_told_before_anything_is_made(
    calib: Calib, few: Path, folder: Path, stage: str, given: Sequence[str], words: Sequence[str]
) -> None:
    more = [f"stats={few}"] if stage == "analyze" else ["data_dir=dataset"]
    line = is_one_clear_line(calib(stage, *more, *given, *LEAST))
    for word in words:
        assert word in line
    assert everything(folder) == []


def test_bits_by_step_need_statistics_with_steps(calib: Calib, few: Path, folder: Path) -> None:
    given = ["analysis=allocate", "analysis.average_activation_bits=6", *LEAST]
    line = is_one_clear_line(calib("analyze", f"stats={few / 'layer_statistics.json'}", *given))
    assert "knows no steps" in line and "activations.h5" in line
    assert everything(folder) == []


def test_a_budget_is_that_of_the_layers_in_the_statistics(calib: Calib, few: Path, folder: Path) -> None:
    """Of all layers together it would be far too small."""
    given = [f"stats={few}", "analysis=allocate", "analysis.megabytes=0.8", *LEAST]
    outcome = calib("analyze", *given)
    assert outcome.status == 0, outcome.err
    assert calib("quantize", "plan=run", run="quantized").status == 0
    made = load(folder / "quantized" / "quantized")
    assert 500_000 < sum(packed.nbytes for packed in made.layers.values()) <= 800_000


UNMEASURED: dict[str, tuple[Callable[[Path, Path], str], int, Sequence[str]]] = {
    "layer statistics alone": (
        lambda few, here: f"stats={few / 'layer_statistics.json'}",
        2,
        ["layer_statistics.json: this heuristic replays stored states", "name a run directory of calib collect"],
    ),
    "activations alone": (
        lambda few, here: f"stats={few / 'activations.h5'}",
        2,
        ["activations.h5: this heuristic replays stored states"],
    ),
    "garbled metadata": (
        lambda few, here: f"stats={copied(few, here, lambda c: c.update(image_ids='x'))}",
        1,
        ["collection_metadata.json: lacks or garbles", "calib collect"],
    ),
    "metadata without images": (
        lambda few, here: f"stats={copied(few, here, lambda c: c.pop('image_ids'))}",
        1,
        ["collection_metadata.json: lacks or garbles 'image_ids'"],
    ),
    "an image that is gone": (
        lambda few, here: f"stats={copied(few, here, lambda c: c.update(image_ids=[0, 9]))}",
        1,
        ["lacks image 9"],
    ),
    "no statistics": (lambda few, here: "stats=null", 2, ["stats is not set"]),
}


def copied(few: Path, here: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The run directory with other metadata."""
    run = Path(shutil.copytree(few, here / "copied"))
    rewritten("collection_metadata.json", change)(run)
    return run


@pytest.mark.parametrize(
    ("heuristic", "case"), [("sensitivity", "layer statistics alone"), *(("allocate", case) for case in UNMEASURED)]
)
def test_what_cannot_be_measured_is_told_before_anything_is_made(
    calib: Calib, few: Path, tmp_path: Path, folder: Path, heuristic: str, case: str
) -> None:
    stats, status, words = UNMEASURED[case]
    line = is_one_clear_line(calib("analyze", stats(few, tmp_path), f"analysis={heuristic}", *LEAST), status)
    for word in words:
        assert word in line
    assert everything(folder) == []


def test_a_dataset_that_was_moved_is_asked_for_and_taken_where_it_is_now(
    few: Path, tiny_run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_run.parent / "dataset", folder / "here")
    given = [*TINY, FEW, "hydra.run.dir=collected", f"cache_dir={few.parent / 'calibration_cache'}"]
    assert run_here(["collect", *given, "data_dir=here"], capsys).status == 0
    (folder / "here").rename(folder / "there")
    analyze = ["analyze", *given[:2], "stats=collected", "analysis=allocate", *LEAST, *given[-1:]]
    before = everything(folder)
    for wrong in ([], ["data_dir=nowhere"]):
        line = is_one_clear_line(run_here([*analyze, *wrong, "hydra.run.dir=run"], capsys))
        assert f"{'nowhere' if wrong else 'here'} holds no dataset; name it with data_dir=DIR" in line
        assert everything(folder) == before
    outcome = run_here([*analyze, "data_dir=there", "hydra.run.dir=run"], capsys)
    assert outcome.status == 0, outcome.err
    assert "Layer Statistics Summary:" in outcome.out


def test_a_layer_without_finite_values_is_named(tiny_run: Path, calib: Calib, folder: Path) -> None:
    shutil.copytree(tiny_run.parent / "dataset", folder / "dataset")
    for image in range(2):
        set_states(folder / "dataset" / f"samples/000{image}.h5", lambda x: x.__setitem__(slice(None), np.nan))
    restated(folder / "dataset")
    given = ["data_dir=dataset", "taps.include=[x_embedder,t_embedder.0]"]
    assert calib("collect", *given, run="collected").status == 0
    for heuristic in ("analysis=allocate", "analysis=range"):
        line = is_one_clear_line(calib("analyze", "stats=collected", heuristic, *LEAST, "data_dir=dataset"), status=1)
        assert "'x_embedder' has no finite activations; look at collection_metadata.json" in line
        check_failed_run(folder / "run", "no finite activations")


@pytest.mark.parametrize("which", [pytest.param("q", marks=pytest.mark.slow), "k"])
def test_of_layers_that_read_one_array_some_may_be_tapped(calib: Calib, folder: Path, which: str) -> None:
    """What was seen of one is what all read."""
    given = [f"cache_dir={folder / 'cache'}"]
    assert calib("collect", f"taps.include=['mm_block_3.*.{which}_proj']", *given, run="collected").status == 0
    trials = ("sensitivity.method=trials", "sensitivity.of=output")
    outcome = calib("analyze", "stats=collected", "analysis=sensitivity", *LEAST, *trials, *given)
    assert outcome.status == 0, outcome.err
    names = [f"mm_block_3.{stream}.attn.{which}_proj" for stream in ("image", "text")]
    assert list(read(folder / "run" / "quantization_config.json")) == names
    assert "measure sensitivities: 18 trials\n" in outcome.err, "of two weights and of two inputs"


# Evaluation


@pytest.fixture
def quantized(tiny_run: Path, folder: Path) -> Path:
    """A run directory with the shared run's quantized model, by itself."""
    shutil.copytree(tiny_run / "quantized", folder / "made" / "quantized")
    return folder / "made"


MODELS: dict[str, tuple[Damage, int, Sequence[str]]] = {
    "no folder": (
        lambda d: shutil.rmtree(d / "quantized"),
        2,
        ["plan=made: no quantized model there", "calib quantize plan=made hydra.run.dir=made makes one"],
    ),
    "no run": (shutil.rmtree, 2, ["plan=made: no quantized model there"]),
    "an empty folder": (
        lambda d: (shutil.rmtree(d / "quantized"), (d / "quantized").mkdir()),
        2,
        ["plan=made", "calib quantize plan=made hydra.run.dir=made makes one"],
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_quantized_model_that_is_not_there_is_told_before_anything_is_made(
    calib: Calib, quantized: Path, folder: Path, case: str
) -> None:
    damage, status, words = MODELS[case]
    damage(quantized)
    before = everything(folder)
    line = is_one_clear_line(calib("evaluate", "plan=made"), status)
    assert all(word in line for word in words)
    assert everything(folder) == before


@pytest.mark.parametrize(
    ("made_by", "shown"),
    [
        ({"name": "fit", "parameters": {"rounds": 3}}, ("fit", 3)),
        ({"name": "fit", "parameters": None}, ("fit", None)),
        ({"name": None}, (None, None)),
        ([], (None, None)),
    ],
    ids=["with parameters", "without", "no name", "no mapping"],
)
def test_a_model_alone_says_what_made_it(
    made_by: Any, shown: tuple[Any, Any], calib: Calib, quantized: Path, folder: Path
) -> None:
    """The quantizer, and not the one that is there by default; what is unknown is none."""
    rewritten("quantized/config.json", lambda c: c.update(quantizer=made_by))(quantized)
    outcome = calib("evaluate", "plan=made")
    assert outcome.status == 0, outcome.err
    config = read_run(folder / "run", "run").config
    assert (config.get("quantizer"), config.get("quantizer.rounds")) == shown and config["analysis"] is None
    assert config["evaluation.num_images"] == 2


def test_no_images_is_nothing_to_evaluate(calib: Calib, quantized: Path, folder: Path) -> None:
    before = everything(folder)
    line = is_one_clear_line(calib("evaluate", "plan=made", "evaluation.num_images=0"))
    assert line.startswith("evaluation.num_images=0: ")
    assert everything(folder) == before


SPOILED: dict[str, tuple[Damage, str]] = {
    "a flipped byte": (
        lambda d: flip_byte(d / "quantized" / "model.safetensors", 1_000_000),
        "made/quantized/model.safetensors: is damaged; run calib quantize again",
    ),
    "cut short": (
        lambda d: (d / "quantized" / "model.safetensors").write_bytes(b""),
        "made/quantized/model.safetensors: is damaged; run calib quantize again",
    ),
    "lost weights": (
        lambda d: (d / "quantized" / "model.safetensors").unlink(),
        "made/quantized/model.safetensors: is missing; run calib quantize again",
    ),
    "other weights": (
        rewritten("quantized/config.json", lambda c: c.update(fingerprint="0123456789abcdef")),
        "the quantized model was made from emoji with other weights",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_model_is_told_and_nothing_is_evaluated(
    calib: Calib, quantized: Path, folder: Path, case: str
) -> None:
    damage, words = SPOILED[case]
    damage(quantized)
    line = is_one_clear_line(calib("evaluate", "plan=made"), status=1)
    assert words in line
    check_failed_run(folder / "run", words)


def test_a_spoiled_noise_floor_is_measured_again(
    calib: Calib, quantized: Path, tiny_run: Path, folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    (cache / "evaluation").mkdir(parents=True)
    wanted = read(tiny_run / "evaluation.json")["control"]
    known = (tiny_run.parent / "calibration_cache" / "evaluation").glob("control_*.json")
    (control,) = (path for path in known if read(path) == wanted)
    (cache / "evaluation" / control.name).write_bytes(control.read_bytes()[:-30])
    outcome = calib("evaluate", "plan=made", f"cache_dir={cache}")
    assert outcome.status == 0, outcome.err
    assert "draw control: 4 steps" in outcome.err
    assert read(cache / "evaluation" / control.name) == read(control)
    assert (folder / "run" / "evaluation.json").read_bytes() == (tiny_run / "evaluation.json").read_bytes()


def test_pictures_of_another_number_of_steps_are_drawn_with_the_nearest_ones_ranges(
    calib: Calib, quantized: Path, folder: Path
) -> None:
    other = ["sampler.num_steps=3", "evaluation.num_images=1", f"data_dir={folder / 'dataset'}"]
    outcome = calib("evaluate", "plan=made", *other)
    assert outcome.status == 0, outcome.err
    assert read(folder / "run" / "evaluation.json")["quantized"]["steps"] == [0, 2]
    assert "output error at 2 of 3 steps" in outcome.out


def test_spare_prompts(tiny_run: Path, few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the list that evaluations do not begin with, and none where the dataset is of another list."""
    states = StoredStates(tiny_run.parent / "dataset", load_manifest(tiny_run.parent / "dataset"), [0], [0])
    config = [f"plan={tiny_run}", f"stats={few}", "stage=quantize"]

    def settings_of(*more: str) -> Settings:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return build(plain(compose("config", overrides=[*config, *more])))

    for more, evaluated in (((), 0), (("evaluation.num_images=400",), 400)):
        settings = settings_of(*more)
        prompts = settings.generate.prompts
        spare = spare_prompts(settings, states)
        assert spare == prompts[: len(prompts) - max(evaluated, len(prompts) // 8)]
    assert spare_prompts(settings_of("prompts.seed=1"), states) == ()
    assert "its prompts are not those of this configuration" in capsys.readouterr().err
