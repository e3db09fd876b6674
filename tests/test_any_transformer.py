"""Everything works on a transformer that is not DiffusionKit's: a plain DiT, an option of the user's own."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.activations.batches import StoredStates
from calib.activations.collect import Collection
from calib.activations.reader import ActivationFile
from calib.activations.step import CollectSettings
from calib.activations.taps import TapKind, TapSelection, tap_points, tapped
from calib.analysis.measure import measure
from calib.analysis.plan import LayerPlan, Plan
from calib.analysis.plan_file import read_plan
from calib.analysis.run_trials import rounded
from calib.analysis.sensitivities import option_bytes
from calib.base.errors import CalibError, ConfigError
from calib.base.files import read_json
from calib.dataset.load import load_manifest
from calib.dataset.sampling import noise_levels
from calib.dataset.store import read_state
from calib.models.architecture import Conditioning, Resumable, Smoothable, check_architecture
from calib.models.memory import plan_memory
from calib.models.model import DiffusionModel, ModelDtype
from calib.models.noise import RectifiedFlow
from calib.quantization import gptq, rtn
from calib.quantization.apply import applied
from calib.quantization.build import quantize
from calib.quantization.checkpoint import load

import mlx.core as mx
import numpy as np
import plain_dit
import pytest
from diffusionkit.mlx.sampler import ModelSamplingDiscreteFlow
from helpers import CHECKOUT, Outcome, float64, is_one_clear_line, run_in, well
from mlx import nn
from numpy.typing import NDArray

#: A folder of configuration such as a user has: calib --config-dir my_conf model=plain_dit.
CONF = CHECKOUT / "tests" / "examples" / "conf"
IMAGES, STEPS = 3, 4
SMALL = (
    *("sampler.batch_size=2", f"num_images={IMAGES}", "timestep_schedule=all", "data_dir=dataset", "report=none"),
    *("evaluation.num_images=2", "evaluation.steps=2", "sensitivity.images=1", "sensitivity.steps=2"),
    *("calibration.images=2", "calibration.steps=2"),
)
BLOCKS = [f"blocks.{i}" for i in range(3)]


def calib(folder: Path, *arguments: str) -> Outcome:
    """``calib`` on the plain DiT."""
    stage = () if "=" in arguments[0] else arguments[:1]
    return run_in(folder, *stage, "--config-dir", str(CONF), "model=plain_dit", *SMALL, *arguments[len(stage) :])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder after the whole job, every tap observed and guidance halves apart; its page is made."""
    folder = tmp_path_factory.mktemp("plain")
    taps = ("taps=all", "taps.cfg_halves=apart", "storage=sampled")
    plan = ("analysis=range", "ranges=static", "quantizer=rtn")
    well(calib(folder, *taps, *plan, "report=html", "hydra.run.dir=run"))
    return folder


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return loaded()


def loaded(**options: Any) -> DiffusionModel:
    return plain_dit.load("plain_dit", ModelDtype.FLOAT32, 1.0, (32, 32), **options)


def states_of(folder: Path, steps: tuple[int, ...] = (0, 2)) -> StoredStates:
    return StoredStates(folder / "dataset", load_manifest(folder / "dataset"), [0], steps)


def test_the_whole_job_ends_in_all_files_and_a_page(folder: Path, model: DiffusionModel) -> None:
    run = folder / "run"
    layers = list(model.architecture.layers())
    assert set(read_json(run / "layer_statistics.json")) == {*layers, *BLOCKS}
    assert set(read_json(run / "quantization_config.json")) == {*layers, *BLOCKS}
    metrics = read_json(run / "metrics.json")
    assert metrics["images"] == IMAGES and metrics["steps"] == STEPS + 1
    assert metrics["psnr"] < metrics["control_psnr"]
    assert 4.5 <= metrics["average_weight_bits"] <= 9
    about = read_json(run / "quantized" / "config.json")
    assert about["plain_dit"] == {"depth": 3, "places": 16, "width": 64} and "mmdit" not in about
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "blocks.1.attn.qkv" in page


def test_activations_are_those_of_every_layer_and_block(folder: Path, model: DiffusionModel) -> None:
    """Each kept row is found in a forward of the model itself, and each layer's extremes are those of such forwards."""
    architecture, manifest = model.architecture, load_manifest(folder / "dataset")
    points = tap_points(architecture, TapSelection(TapKind.ALL))
    seen: dict[str, list[NDArray[np.float64]]] = {point.name: [] for point in points}

    def record(name: str, x: mx.array) -> mx.array:
        seen[name].append(float64(x))
        return x

    step = 2
    with tapped(architecture, points, record):
        for image in range(IMAGES):
            x = mx.array(read_state(folder / "dataset", manifest, image, step).astype(np.float32))
            text = model.encode([str(manifest.images[image].prompt)], manifest.cfg_weight)
            timestep = mx.array(manifest.timesteps[step])
            mx.eval(model.velocity(mx.stack([x, x]), text, timestep))
    with ActivationFile(folder / "run" / "activations.h5") as file:
        assert {file.kind(name) for name in BLOCKS} == {"block"}
        for name, own in seen.items():
            values = np.stack(own)  # (images, halves, …, channels)
            statistics = file.by_step(name)[step]
            np.testing.assert_allclose(statistics.minimum, values.min(axis=tuple(range(values.ndim - 1))), atol=1e-5)
            np.testing.assert_allclose(statistics.maximum, values.max(axis=tuple(range(values.ndim - 1))), atol=1e-5)
            for half, part in enumerate(("conditional", "unconditional")):
                apart = file.by_step(f"{name}/{part}")[step]
                np.testing.assert_allclose(apart.maximum.max(), values[:, half].max(), atol=1e-5)
            kept, rows = file.samples(name, step).astype(np.float64), values.reshape(-1, values.shape[-1])
            nearest = np.abs(kept[:, None] - rows[None]).max(axis=-1).min(axis=1)
            assert (nearest <= 1e-3 * np.abs(rows).max()).all(), name


def test_layers_that_read_one_array_share_a_tap(folder: Path, model: DiffusionModel) -> None:
    shared = {
        "blocks.0.modulation": {*(f"{block}.modulation" for block in BLOCKS), "head_modulation"},
        "blocks.0.cross.kv": {f"{block}.cross.kv" for block in BLOCKS},
    }
    with ActivationFile(folder / "run" / "activations.h5") as file:
        groups: dict[str, set[str]] = {}
        for name in model.architecture.layers():
            groups.setdefault(file.same_data(name), set()).add(name)
        assert {first: names for first, names in groups.items() if len(names) > 1} == shared
        assert file.kind("blocks.2.mlp.down") == "post-gelu"


def test_blocks_and_layers_are_in_the_order_of_the_network(tmp_path: Path) -> None:
    """Twelve blocks: 10 comes after 9, not after 1."""
    tiny = ("model.depth=12", "num_images=1", "sampler.num_steps=1", "timestep_schedule=quarters", "taps=all")
    taps = "taps.include=['blocks.?','blocks.??','*.qkv','*_embed','head']"
    well(calib(tmp_path, "collect", *tiny, taps, "generate_missing=true", "hydra.run.dir=run"))
    layers = [name for name in loaded(depth=12).architecture.layers() if name.endswith((".qkv", "_embed", "head"))]
    with ActivationFile(tmp_path / "run" / "activations.h5") as file:
        assert [name for name in file.layers if file.kind(name) == "block"] == [f"blocks.{i}" for i in range(12)]
        assert [name for name in file.layers if file.kind(name) != "block"] == layers
        assert file.layers.index("blocks.10") == file.layers.index("blocks.10.attn.qkv") - 1
        assert file.layers[0] == "patch_embed" and file.layers[-1] == "head"


@pytest.mark.parametrize("kind", TapKind)
def test_taps_are_chosen_by_kind_and_pattern(kind: TapKind, model: DiffusionModel) -> None:
    points = tap_points(model.architecture, TapSelection(kind, ["blocks.[02]*"], ["blocks.2*"]))
    layers = {f"blocks.0.{layer}" for layer in plain_dit.WITHIN_BLOCK}
    expected = {"linear": layers, "block": {"blocks.0"}, "all": layers | {"blocks.0"}}
    assert {name for point in points for name in point.names} == expected[kind]


def test_an_unknown_pattern_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    line = is_one_clear_line(calib(tmp_path, "taps.include=['*.atn.qkv']"))
    assert line == "taps.include=*.atn.qkv: matches no layer. Did you mean '*.attn.qkv' or '*.attn.out'?"
    assert not list(tmp_path.iterdir())


def test_convergence_verify_and_rebuild_manifest_take_it(folder: Path, tmp_path: Path) -> None:
    assert "blocks.1.mlp.down" in well(run_in(folder, "convergence", "run", "--layers", "40")).out
    assert "sound" in well(run_in(folder, "verify", "dataset")).out
    copy = shutil.copytree(folder / "dataset", tmp_path / "dataset")
    manifest = (copy / "manifest.json").read_bytes()
    (copy / "manifest.json").unlink()
    well(run_in(tmp_path, "rebuild-manifest", "dataset"))
    assert (copy / "manifest.json").read_bytes() == manifest


def slow_sensitivity(model: DiffusionModel, states: StoredStates, name: str, option: tuple[int, int]) -> list[float]:
    """S at each step, by whole forwards of one state at a time."""
    layer = model.architecture.layers()[name]
    own, found = layer.weight, []
    for make in states.batches(model, 1):
        batch = make()
        exact = float64(model.velocity(batch.x, batch.text, batch.timesteps))
        layer.weight = rounded(own, *option)
        changed = float64(model.velocity(batch.x, batch.text, batch.timesteps))
        layer.weight = own
        found.append(float(((changed - exact) ** 2).sum() / (exact**2).sum()))
    return found


def test_sensitivities_are_those_of_whole_forwards(folder: Path, model: DiffusionModel, tmp_path: Path) -> None:
    """The plain DiT cannot be started in the middle: each trial is a whole forward."""
    assert not isinstance(model.architecture, Resumable) and not isinstance(model.architecture, Smoothable)
    names = ("time_mlp.1", "blocks.1.attn.qkv", "blocks.2.modulation", "head")
    layers = {name: model.architecture.layers()[name] for name in names}
    states = states_of(folder)
    points = [point for point in tap_points(model.architecture, TapSelection()) if point.name == "blocks.0.cross.kv"]
    found = measure(lambda: model, layers, points, states, {"blocks.0.cross.kv": (-3.0, 3.0)}, tmp_path, [64])
    for name in names:
        for bits in (2, 8):
            expected = slow_sensitivity(model, states, name, (bits, 64))
            np.testing.assert_allclose(found.weights[name][bits, 64], expected, rtol=1e-3, err_msg=name)
    assert set(found.activations) == {f"{block}.cross.kv" for block in BLOCKS}


def test_allocate_meets_its_budget_and_gptq_and_evaluate_follow(folder: Path, model: DiffusionModel) -> None:
    well(calib(folder, "collect", "taps.include=['blocks.[01]*','patch_embed','head']", "hydra.run.dir=some"))
    given = ("analysis=allocate", "analysis.average_bits=5", "sensitivity.group_sizes=[64]")
    well(calib(folder, "analyze", "stats=some", *given, "hydra.run.dir=planned"))
    plan = read_json(folder / "planned" / "quantization_config.json")
    layers = model.architecture.layers()
    nbytes = weights = 0
    for name in set(plan) - {"patch_embed"}:
        shape = layers[name].weight.shape
        nbytes += option_bytes(shape, plan[name]["suggested_weight_bits"], plan[name]["group_size"])
        weights += shape[0] * shape[1]
    assert 4.9 < 8 * nbytes / weights <= 5
    outcome = well(calib(folder, "quantize", "plan=planned", "quantizer=gptq", "stats=some", "hydra.run.dir=gptq"))
    assert "gptq: " in outcome.err
    well(calib(folder, "evaluate", "plan=gptq", "hydra.run.dir=evaluated"))
    metrics = read_json(folder / "evaluated" / "metrics.json")
    assert np.isfinite(metrics["psnr"]) and metrics["output_error"] < 1
    well(calib(folder, "analyze", "stats=some", "analysis=uniform", "hydra.run.dir=uniform"))
    table = well(run_in(folder, "compare", "uniform", "planned", "--layers", "--all")).out
    assert "blocks.0.attn.qkv" in table and "18 agree" not in table


def test_gptq_loses_less_than_rounding_to_nearest(folder: Path, model: DiffusionModel) -> None:
    """On the states that it saw, and with layers of several blocks that read one array."""
    states, run = states_of(folder), folder / "run"
    plan = {name: LayerPlan(3, 16) for name in model.architecture.layers()}
    errors = {}
    for quantizer in (rtn.quantize, gptq.quantize):
        quantized, _ = quantize(model, Plan(plan), run / "activations.h5", quantizer, states=states)
        errors[quantizer] = 0.0
        for make in states.batches(model, 2, mixed=True):
            batch = make()
            exact = float64(model.velocity(batch.x, batch.text, batch.timesteps))
            with applied(model, quantized):
                changed = float64(model.velocity(batch.x, batch.text, batch.timesteps))
            errors[quantizer] += float(((changed - exact) ** 2).sum())
    assert errors[gptq.quantize] < 0.9 * errors[rtn.quantize]


@pytest.mark.parametrize("stage", ["run", "quantize"])
def test_smooth_is_refused_in_one_line_before_anything_is_drawn(folder: Path, stage: str, tmp_path: Path) -> None:
    given = (f"plan={folder / 'run'}",) if stage == "quantize" else ()
    line = is_one_clear_line(calib(tmp_path, stage, "quantizer=smooth", *given))
    assert line.startswith("quantizer=smooth: this model does not say where a factor can be moved")
    assert not list(tmp_path.iterdir())


def test_a_saved_model_is_loaded_again_bit_for_bit(folder: Path, model: DiffusionModel) -> None:
    """By calib, and by MLX alone."""
    saved = folder / "run" / "quantized"
    first, again = load(saved), loaded()
    own = model.architecture.layers()
    assert set(first.layers) == set(own) - {"patch_embed"}, "16 columns are no group"
    x, text = mx.random.normal((2, 8, 8, 4), key=mx.random.key(0)), model.encode(["red apple", "rocket"], 0)
    timestep = mx.array(500.0)
    outputs = []
    for one in (model, again):
        before = one.fingerprint
        with applied(one, first):
            outputs.append(np.array(one.velocity(x, text, timestep)))
        assert dict.fromkeys(own) == dict.fromkeys(one.architecture.layers())
        one._fingerprint = ""
        assert one.fingerprint == before, "afterwards the model is what it was"
    np.testing.assert_array_equal(*outputs)
    about = read_json(saved / "config.json")
    alone = plain_dit.PlainDiT(**about["plain_dit"])
    nn.quantize(alone, class_predicate=lambda path, _: about["layers"].get(path, False))
    alone.load_weights(str(saved / "model.safetensors"))
    with applied(again, replace(first, inputs={})):
        expected = again.velocity(x, text, timestep)
    np.testing.assert_allclose(np.array(alone(x, text.tokens, mx.full((2,), 500.0))), np.array(expected), atol=2e-3)


def test_quantizing_from_python_needs_no_command_line(folder: Path, model: DiffusionModel) -> None:
    run = folder / "run"
    quantized, _ = quantize(model, Plan(read_plan(run / "quantization_config.json")), run / "activations.h5")
    stored = load(run / "quantized")
    for name, layer in quantized.layers.items():
        assert mx.array_equal(layer.weight, stored.layers[name].weight).item(), name
    assert {name: rule.ranges for name, rule in quantized.inputs.items()} == {
        name: rule.ranges for name, rule in stored.inputs.items()
    }


def test_16_bits_and_another_size(tmp_path: Path) -> None:
    model = plain_dit.load("plain_dit", ModelDtype.BFLOAT16, 3.0, (24, 40))
    assert model.latent_shape == (6, 10, 4)
    text = model.encode(["red apple"], 2.0)
    v = model.velocity(mx.zeros((2, 6, 10, 4), dtype=model.dtype), text, mx.array(100.0).astype(model.dtype))
    assert v.dtype == mx.bfloat16 and v.shape == (2, 6, 10, 4)
    well(calib(tmp_path, "generate", "num_images=1", "sampler.num_steps=1", "sampler.image_size=[24,40]"))
    line = is_one_clear_line(calib(tmp_path, "generate", "sampler.image_size=[30,30]"))
    assert line == "sampler.image_size=[30, 30]: plain_dit draws multiples of 8"


def test_memory_is_planned_with_the_models_own_figure_of_its_decoder(model: DiffusionModel) -> None:
    plan = plan_memory(model, guidance=True)
    assert plan.needs.decoding == model.decoding_bytes == 2 * 3 * 4 * 32 * 32
    unknown = plan_memory(replace(model, decoding_bytes=None), guidance=True)
    assert unknown.needs.decoding == 0 and unknown.batch_size == plan.batch_size
    small = plan_memory(model, guidance=True, memory=plan.peak - plan.drawing + plan.needs.drawing)
    assert (small.batch_size, small.warning) == (1, None)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_rectified_flow_has_the_levels_of_diffusionkits_sampler(shift: float, num_steps: int) -> None:
    ours, theirs = RectifiedFlow(shift), ModelSamplingDiscreteFlow(shift)
    np.testing.assert_array_equal(noise_levels(ours, num_steps), noise_levels(theirs, num_steps))
    x, v, sigma = mx.ones((2, 2, 2, 3)), mx.full((2, 2, 2, 3), 0.5), mx.array(0.3)
    assert mx.array_equal(ours.calculate_denoised(sigma, v, x), theirs.calculate_denoised(sigma, v, x)).item()
    assert mx.array_equal(ours.noise_scaling(sigma, v, x), theirs.noise_scaling(sigma, v, x)).item()


def changed(**members: Any) -> Any:
    """The plain DiT's architecture with other members."""
    kind = type("Changed", (plain_dit.PlainDiTArchitecture,), members)
    return kind(plain_dit.PlainDiT(2, 16))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (
            {"path": lambda self, name: f"net.{name}"},
            "patch_embed has path 'net.patch_embed', where the network has no",
        ),
        ({"shared_input": lambda self, name: "q"}, "patch_embed shares its input with 'q', which is no layer"),
        ({"input_layer": "x_embedder"}, "input_layer 'x_embedder' is no layer"),
        ({"blocks": lambda self: ["a/b"], "layers": lambda self: {"head": self.module.head}}, "a/b has a /"),
    ],
)
def test_names_that_do_not_fit_together_are_told(members: dict[str, Any], words: str) -> None:
    check_architecture(changed(), "model")
    with pytest.raises(ConfigError) as error:
        check_architecture(changed(**members), "model.skeleton=mine")
    assert str(error.value).startswith(f"model.skeleton=mine: {words}")


def bare(name: str, dtype: str, image_size: tuple[int, ...], cfg_weight: float, depth: int) -> nn.Module:
    """A skeleton that returns the network itself, as one may at first."""
    return plain_dit.PlainDiT(depth, 16)


def test_a_skeleton_that_is_no_architecture_is_told_in_one_line(tmp_path: Path) -> None:
    line = is_one_clear_line(calib(tmp_path, f"model.skeleton={__name__}.bare"))
    assert line.startswith(f"model.skeleton={__name__}.bare: PlainDiT is no Architecture, it lacks ")
    assert "shared_input" in line and not list(tmp_path.iterdir())


def test_layers_that_see_fewer_rows_are_told(folder: Path, model: DiffusionModel, tmp_path: Path) -> None:
    """A timestep's embedding that is not repeated for every row would count as one row's."""

    class Once(plain_dit.PlainDiTArchitecture):
        def velocity(self, x: mx.array, text: Conditioning, timestep: mx.array) -> mx.array:
            v: mx.array = self.module(x, text.tokens, timestep.reshape(-1))
            return v

    manifest = load_manifest(folder / "dataset")
    other = replace(model, architecture=Once(model.architecture.module))
    points = tap_points(other.architecture, TapSelection())
    where = (folder / "dataset", manifest, [0, 1], points, CollectSettings(batch_size=2), tmp_path)
    with pytest.raises(CalibError, match=r"time_mlp.0 reads an array of shape \(1, 64\) in a forward of \d rows"):
        Collection(other.architecture, lambda: other, *where).collect([0])


def test_a_model_without_a_skeleton_is_loaded_where_its_shape_is_asked_for(tmp_path: Path) -> None:
    few = ("sampler.num_steps=1", "num_images=1", "timestep_schedule=quarters", "taps.include=['head']")
    well(calib(tmp_path, "collect", "~model.skeleton", *few, "generate_missing=true", "hydra.run.dir=run"))
    assert set(read_json(tmp_path / "run" / "layer_statistics.json")) == {"head"}


def test_only_models_know_diffusionkit() -> None:
    modules = {path.relative_to(CHECKOUT): path.read_text() for path in (CHECKOUT / "calib").rglob("*.py")}
    importing = re.compile(r"^\s*(from|import) diffusionkit\b", re.MULTILINE)
    knowing = {path for path, source in modules.items() if importing.search(source)}
    assert knowing and {path.parts[1] for path in knowing} == {"models"}
