"""A transformer that is streamed from its checkpoint: the same to the bit, in the memory of two blocks."""

import os
import resource
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from calib.activations.batches import StoredStates
from calib.activations.samples import Samples, SampleSettings
from calib.activations.taps import Halves, TapKind, TapSelection
from calib.analysis import gradients
from calib.analysis.layers import LayerSummary
from calib.analysis.measure import sensitivities
from calib.analysis.plan import LayerPlan
from calib.analysis.ranges import static
from calib.analysis.sensitivities import Of
from calib.analysis.steps import StepPlan
from calib.base import progress
from calib.base.errors import CalibError, ConfigError
from calib.base.files import read_json, write_json
from calib.dataset.load import load_manifest
from calib.evaluation.paired import rounded_to_bfloat16
from calib.models import memory
from calib.models.backward_memory import BackwardPlan
from calib.models.memory import plan_memory
from calib.models.model import DiffusionModel, ModelDtype, weights
from calib.models.placed import placed
from calib.models.streamed import Streamed
from calib.models.tensors import read_weights
from calib.quantization import gptq, learned, replays, rtn, scratch, smooth, taqdit
from calib.quantization.apply import applied
from calib.quantization.build import Calibration, quantize_layers
from calib.quantization.quantizer import Quantizer
from calib.quantization.unfinished import MARK

import mlx.core as mx
import numpy as np
import plain_dit
import pytest
import wide_model
from helpers import command, contents, environment, is_one_clear_line, run_in, tiny, well
from tiny_models import draw, tiny_model
from watching import collected, collection_of

STEPS = (0, 2, 4)
EVERY = TapSelection(kind=TapKind.ALL, cfg_halves=Halves.APART)


def streamed(whole: DiffusionModel, structure: str, path: Path, dtype: mx.Dtype = mx.float32) -> DiffusionModel:
    """The same model, streamed from a file at ``path``."""
    mx.save_safetensors(str(path), weights(whole.transformer))
    again = tiny_model(whole, structure, dtype)
    model = placed(again, lambda: read_weights(str(path)), str(path), True, dtype=dtype)
    assert isinstance(model.architecture, Streamed)
    return model


@dataclass(frozen=True)
class Case:
    """A model in memory and streamed, and a dataset that it drew."""

    whole: DiffusionModel
    model: DiffusionModel
    file: Path
    data_dir: Path

    @property
    def both(self) -> tuple[DiffusionModel, DiffusionModel]:
        return self.whole, self.model

    @property
    def states(self) -> StoredStates:
        return StoredStates(self.data_dir, load_manifest(self.data_dir), [0, 1, 2], (0, 2))

    def outputs(self, model: DiffusionModel) -> list[np.ndarray]:
        return [
            np.array(model.velocity(batch.x, batch.text, batch.timesteps).astype(mx.float32))
            for batch in (make() for make in self.states.batches(model, 2))
        ]


#: DiffusionKit's smallest, and the family whose activations are of another type than its weights; further ones.
CASES = ("sd3", "qwen bfloat16")
FURTHER = ("flux bfloat16", "zimage", "flux2", "flux1_dev bfloat16")


def cases(*by_default: str) -> list[Any]:
    return [pytest.param(c, marks=() if c in by_default else pytest.mark.slow) for c in (*CASES, *FURTHER)]


@pytest.fixture(scope="module", params=cases(*CASES))
def case(request: pytest.FixtureRequest, model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Case:
    structure, _, kind = request.param.partition(" ")
    folder = tmp_path_factory.mktemp("streamed")
    dtype = mx.bfloat16 if kind else mx.float32
    whole = tiny_model(model, structure, dtype)
    file = folder / "weights.safetensors"
    return Case(whole, streamed(whole, structure, file, dtype), file, draw(whole, folder / "dataset"))


def test_it_draws_the_same_bytes(case: Case, tmp_path: Path) -> None:
    assert case.model.fingerprint == case.whole.fingerprint
    assert contents(draw(case.model, tmp_path)) == contents(case.data_dir)


@pytest.mark.parametrize("case", cases("sd3"), indirect=True)
def test_statistics_and_kept_activations_are_the_same(case: Case, tmp_path: Path) -> None:
    settings = {"samples": SampleSettings(Samples.ROWS, 3)}
    found = []
    for which, model in zip(("whole", "streamed"), case.both, strict=True):
        collection = collection_of(model, case.data_dir, tmp_path / which, [0, 1, 2], EVERY, **settings)
        records = collected(collection, STEPS)
        kept = {
            (step, name): np.concatenate(list(collection._kept_rows(record, name)))
            for step, record in records.items()
            for name in record.samples
        }
        found.append((records, kept))
    (whole, rows), (own, same_rows) = found
    assert rows and rows.keys() == same_rows.keys()
    assert all(np.array_equal(rows[place], same_rows[place]) for place in rows)
    for step in STEPS:
        assert whole[step].seen.keys() == own[step].seen.keys()
        for name, seen in whole[step].seen.items():
            other = own[step].seen[name]
            assert np.array_equal(seen.ranges, other.ranges), name
            for key in ("minimum", "maximum", "count"):
                assert np.array_equal(getattr(seen.statistics, key), getattr(other.statistics, key)), name
            assert np.array_equal(seen.statistics.moments.sums, other.statistics.moments.sums), name
            for key in ("keys", "counts"):
                histograms = (getattr(each.statistics.histogram, key) for each in (seen, other))
                assert np.array_equal(*histograms), name


QUANTIZERS: dict[str, Quantizer] = {
    "rtn": partial(rtn.quantize, search=False),
    "gptq": partial(gptq.quantize, memory_gb=5e-5, search=False, rotation=16),  # several replays a block
}
QUANTIZERS["gptq without room"] = QUANTIZERS["gptq"]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_packed_weights_and_what_they_draw_are_the_same(
    case: Case, quantizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quantizer == "gptq without room":
        monkeypatch.setattr(replays, "LEAST_ROOM", -1)
        monkeypatch.setattr(replays, "OF_WHAT_IS_LEFT", 0.0)
        monkeypatch.setattr(scratch, "free_bytes", lambda folder: 0)
    monkeypatch.setattr(memory, "LARGEST_BATCH", 3)  # else more of a streamed model's, which sum in another order
    every = list(case.whole.architecture.layers())
    plan = {name: LayerPlan(3 + i % 3, 16 if i % 3 else 8) for i, name in enumerate(every[::8])}
    copies = {"late": dict.fromkeys(every[::16], 8)}
    steps = StepPlan(case.states.manifest.timesteps[:4], {"early": (0, 1), "late": (2, 3)}, weight_bits=copies)
    left = next(name for name in every if name not in plan and name.endswith("_proj"))  # it stays at 16 bits
    source = Calibration(None, static, lambda: case.states)
    quantized, plain = [], case.outputs(case.whole)
    for model in case.both:
        made, _ = quantize_layers(model, plan, steps, QUANTIZERS[quantizer], source, {})
        quantized.append(made)
        assert all(np.array_equal(a, b) for a, b in zip(case.outputs(model), plain, strict=True)), "it is as it was"
    first, second = ({**made.parameters()} for made in quantized)
    assert first.keys() == second.keys() and all(mx.array_equal(first[key], second[key]) for key in first)
    assert first[f"{case.whole.architecture.path(left)}.weight"].dtype != mx.uint32
    assert quantized[0].inputs == quantized[1].inputs
    rotated = [16] * sum(layer.activation_bits == 8 for layer in plan.values()) if quantizer != "rtn" else []
    assert [rule.rotation for rule in quantized[0].inputs.values()] == rotated
    assert quantized[0].copies["late"].keys() == copies["late"].keys()
    for name, packed in quantized[0].copies["late"].items():
        assert packed.bits == 8 and mx.array_equal(packed.weight, quantized[1].copies["late"][name].weight), name
    drawn = []
    for model, made in zip(case.both, quantized, strict=True):
        with applied(model, made, dequantize=True):
            drawn.append(case.outputs(model))
    assert all(np.array_equal(a, b) for a, b in zip(*drawn, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(drawn[0], plain, strict=True))


@pytest.mark.parametrize("case", cases("qwen bfloat16"), indirect=True)
def test_sensitivities_of_the_output_are_the_same(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model in memory whose backward passes go by parts; no gradient outlasts its block."""
    monkeypatch.setattr(gradients, "plan_backward", lambda *_: BackwardPlan(2, by_parts=True, nbytes=0))
    summary = LayerSummary(-1.0, 1.0, 0.0, 0.5, {"p01": -0.9, "p99": 0.9}, 100)
    layers, states = dict.fromkeys(case.whole.architecture.layers(), summary), replace(case.states, images=[0, 1])
    found = [
        gradients.gradient_sensitivities(
            lambda model=model: model, model.architecture, layers, states, tmp_path / which, Of.OUTPUT, (64,)
        )
        for which, model in zip(("whole", "streamed"), case.both, strict=True)
    ]
    for kind in ("weights", "activations"):
        first, second = (getattr(each, kind) for each in found)
        assert first.keys() == second.keys() and len(first) > 5
        for name, own in first.items():
            assert own.keys() == second[name].keys(), name
            assert all(np.array_equal(own[option], second[name][option]) for option in own), name
        assert sum(value.any() for own in first.values() for value in own.values()) > 20


def test_the_control_is_the_same(case: Case) -> None:
    found = []
    for model in case.both:
        with rounded_to_bfloat16(model):
            found.append(case.outputs(model))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    assert all(np.array_equal(*pair) for pair in zip(*map(case.outputs, case.both), strict=True)), "it is as it was"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a model of twelve blocks."""
    path = tmp_path_factory.mktemp("wide") / "weights.safetensors"
    wide_model.write(path, width=256, depth=12)
    return path


def wide(file: Path, stream: bool | None = True) -> DiffusionModel:
    return wide_model.load("wide", 1.0, (64, 64), str(file), width=256, depth=12, stream=stream)


def test_no_more_than_two_blocks_are_in_memory(file: Path) -> None:
    """While it runs, while all layers are looked at, and while its fingerprint is made; and nothing after."""
    own = wide(file)
    assert own.streamed is not None
    text, x = own.encode(["red apple"], 0), mx.random.normal((1, *own.latent_shape), key=mx.random.key(0))
    mx.eval(x, own.velocity(x, text, 500.0))  # what stays is read now
    block = sum(own.streamed.bytes_read for _ in range(2)) / 12  # in float32 twice as much as in the file

    def look() -> None:
        for layer in own.layers().values():
            mx.eval(layer.weight)

    for work in (lambda: mx.eval(own.velocity(x, text, 500.0)), look, lambda: own.fingerprint):
        own.streamed.release()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        work()
        assert 0 < mx.get_peak_memory() - before < 4 * block
        own.streamed.release()
        assert mx.get_active_memory() - before < 0.1 * block


def test_it_is_streamed_where_it_does_not_fit(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = wide(file, stream=False)
    plan = plan_memory(whole, True, 1)
    needed = plan.needs.transformer + plan.needs.decoder + plan.drawing
    said = "its 0.1 GB are read anew in each forward, block by block"
    for there, is_streamed, note in (
        (needed, False, ""),
        (needed - 1, True, said),
        (plan.needs.transformer - 1, True, said),
    ):
        progress.note.cache_clear()
        monkeypatch.setattr(memory, "device_memory", lambda there=there: there)
        model = wide(file, stream=None)
        assert (model.streamed is not None) == is_streamed
        err = capsys.readouterr().err
        assert err.count("calib: note: memory: ") == (note != "") and note in err
        assert wide(file, stream=False).streamed is None
    own = plan_memory(model, True, memory=there)
    assert "(streamed: each forward reads " in own.describe()
    assert own.needs.transformer < plan.needs.transformer / 2


def test_more_images_at_once_are_drawn_with_weights_that_are_read(file: Path) -> None:
    model, whole = wide(file), wide(file, stream=False)
    large = replace(model, latent_shape=(128, 128, 16)), replace(whole, latent_shape=(128, 128, 16))
    many, few = (plan_memory(own, True, memory=10**12).batch_size for own in large)
    assert few == 1 and many == memory.LARGEST_BATCH


def test_a_transformer_that_does_not_run_in_parts_is_not_streamed(model: DiffusionModel) -> None:
    plain = plain_dit.load("plain_dit", ModelDtype.FLOAT32, 1.0, (32, 32))
    own = weights(plain.transformer)
    assert placed(replace(plain), lambda: own, "somewhere", None).streamed is None
    with pytest.raises(ConfigError, match=r"model\.stream=True: .* does not run in parts"):
        placed(plain, lambda: own, "somewhere", True)


LAYERS = {"mm_block_1.image.mlp.fc2": LayerSummary(-1.0, 1.0, 0.0, 0.5, {"p01": -0.9, "p99": 0.9}, 100)}


def measured(case: Case, how: Callable[..., Any], home: Path) -> object:
    return how(lambda: case.model, case.model.architecture, LAYERS, case.states, home)


def quantized_by(case: Case, quantizer: Quantizer, home: Path) -> object:
    source = Calibration(None, static, lambda: case.states, home=home)
    return quantize_layers(case.model, dict.fromkeys(LAYERS, LayerPlan(4, 16)), StepPlan(), quantizer, source, {})


REFUSED: dict[str, tuple[Callable[..., object], str]] = {
    "sensitivity.method=trials": (partial(measured, how=sensitivities), "set sensitivity.method=gradient"),
    "quantizer=learned": (
        partial(quantized_by, quantizer=partial(learned.quantize, held_out=1)),
        "choose quantizer=gptq",
    ),
    "quantizer=taqdit": (partial(quantized_by, quantizer=taqdit.quantize), "choose quantizer=gptq"),
    "quantizer=smooth": (partial(quantized_by, quantizer=smooth.quantize), "choose quantizer=gptq"),
    "quantizer.pictures=2": (
        partial(quantized_by, quantizer=partial(gptq.quantize, pictures=2)),
        "with quantizer.pictures=0",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_all_weights_at_once_is_refused_in_one_line(what: str, tmp_path: Path, small: Case) -> None:
    """And leaves the mark of a training that was interrupted where there was more memory."""
    call, instead = REFUSED[what]
    write_json(tmp_path / MARK, {"method": what})
    with pytest.raises(CalibError, match="weights in memory, and this model's are read in each forward") as error:
        call(small, home=tmp_path)
    assert (tmp_path / MARK).exists()
    assert what in str(error.value) and instead in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def small(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("small")
    whole = tiny_model(model, "sd3")
    return Case(
        whole, streamed(whole, "sd3", folder / "w.safetensors"), folder / "w.safetensors", draw(whole, folder / "data")
    )


@pytest.mark.parametrize(("there", "noted"), [(10**12, False), (10**6, True)])
def test_more_than_there_is_for_gradients(
    there: int,
    noted: bool,
    small: Case,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gradients, "device_memory", lambda: there)
    for which, case, is_noted in (("s", small, False), ("w", replace(small, model=small.whole), noted)):
        measured(case, partial(gradients.gradient_sensitivities, of=Of.OUTPUT), tmp_path / which)
        said = "this may be slow or killed; model.stream=true takes less"
        assert (said in capsys.readouterr().err) == is_noted


@pytest.mark.parametrize("damage", ["truncated", "another", "gone"])
def test_a_checkpoint_that_changes_is_named_in_one_line(small: Case, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    model = streamed(small.whole, "sd3", path)
    content, other = path.read_bytes(), tmp_path / "other.safetensors"
    if damage == "truncated":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif damage == "another":
        own = weights(small.whole.transformer)
        mx.save_safetensors(str(other), {name: weight[:1] for name, weight in own.items()})
        other.replace(path)
    else:
        path.unlink()
    with pytest.raises(CalibError) as error:
        if damage == "truncated":
            _ = model.fingerprint
        for _ in range(2):  # the weights of the first may have been opened before
            small.outputs(model)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_job_that_was_finished_stays_so_whether_or_not_it_is_streamed(tmp_path: Path) -> None:
    """The key has no part in a dataset's folder, nor in the fingerprint of a run."""
    job = ("generate", "num_images=1", "sampler.num_steps=1", "report=none", "hydra.run.dir=run")
    first = well(run_in(tmp_path, *job, "model.stream=true"))
    assert "(streamed: each forward reads " in first.err
    assert "Already complete: run" in well(run_in(tmp_path, *job)).out
    more = well(run_in(tmp_path, *job, "num_images=2"))
    assert "1 image to do" in more.err and "streamed" not in more.err
    assert len(list(tmp_path.glob("calibration_data/*"))) == 1


@pytest.mark.parametrize(
    ("wanted", "instead"),
    [
        (
            ("analysis=allocate", "sensitivity.method=trials", "sensitivity.of=output"),
            "set sensitivity.method=gradient",
        ),
        (("analysis=uniform", "quantizer=taqdit"), "choose quantizer=gptq"),
    ],
)
def test_a_whole_job_that_cannot_be_done_is_refused_before_anything_is_drawn(
    wanted: Sequence[str], instead: str, tmp_path: Path
) -> None:
    assert instead in is_one_clear_line(run_in(tmp_path, *tiny(*wanted, "model.stream=true")))
    assert not list(tmp_path.iterdir())


def job(file: Path, *arguments: str, width: int, depth: int) -> list[str]:
    own = (*("model.name=wide", "model._target_=wide_model.load", "~model.skeleton", "~model.dtype", "report=none"),)
    sizes = (f"+model.file={file}", f"+model.width={width}", f"+model.depth={depth}")
    return command(*arguments, *own, *sizes, "sampler.batch_size=2", "num_images=2")


def limited(folder: Path, megabytes: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """A process to which the system gives so much memory for data, and two processors at most."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (megabytes << 20,) * 2)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])

    path = os.pathsep.join([str(Path(__file__).parent), environment()["PYTHONPATH"]])
    own = environment() | {"PYTHONPATH": path}
    return subprocess.run(arguments, cwd=folder, env=own, preexec_fn=limit, capture_output=True, text=True, timeout=900)


on_linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or memory.on_gpu(), reason="limits memory of a CPU")


@on_linux
@pytest.mark.slow
def test_a_process_with_less_memory_than_weights_draws(tmp_path: Path) -> None:
    """What fails with all weights in memory."""
    file = tmp_path / "weights.safetensors"
    assert wide_model.write(file, width=640, depth=12) > 690e6
    drawing = job(file, "generate", "sampler.num_steps=1", width=640, depth=12)
    streamed = limited(tmp_path, 600, [*drawing, "data_dir=streamed", "hydra.run.dir=run"])
    assert streamed.returncode == 0, streamed.stderr
    assert "are read anew in each forward" in streamed.stderr
    assert limited(tmp_path, 600, [*drawing, "data_dir=whole", "model.stream=false"]).returncode != 0


@on_linux
@pytest.mark.slow
def test_a_whole_job_on_a_model_larger_than_memory(tmp_path: Path) -> None:
    """Stage by stage: the same bytes, statistics and weights as where there is enough memory."""
    sizes, file = {"width": 768, "depth": 24}, tmp_path / "weights.safetensors"
    limit = wide_model.write(file, **sizes) / 1.5
    how = (*("sampler.num_steps=2", "timestep_schedule=list", "timestep_schedule.steps=[0,1]", "analysis=uniform"),)
    how += (*("quantizer=rtn", "quantizer.search=false", "data_dir=data"),)
    how += (*("evaluation.num_images=1", "evaluation.steps=1"),)
    sources = {"analyze": "stats=collect", "quantize": "plan=analyze", "evaluate": "plan=quantize"}
    for folder, megabytes in (("streamed", int(limit) >> 20), ("whole", 16_000)):
        (tmp_path / folder).mkdir()
        for stage in ("generate", "collect", "analyze", "quantize", "evaluate"):
            more = [sources[stage]] if stage in sources else []
            command = job(file, stage, *how, *more, f"hydra.run.dir={stage}", **sizes)
            done = limited(tmp_path / folder, megabytes, command)
            assert done.returncode == 0, (stage, done.stderr)
            read_anew = "read anew" in done.stderr
            assert read_anew == (folder == "streamed" and stage != "analyze")
    both = [contents(tmp_path / folder) for folder in ("streamed", "whole")]
    same = [name for name in both[0] if name.startswith("data/") or name.endswith("safetensors")]
    assert {"collect/layer_statistics.json", "analyze/quantization_config.json"} <= both[0].keys()
    for name in (*same, "collect/layer_statistics.json", "analyze/quantization_config.json"):
        assert both[0][name] == both[1][name], name
    metrics = [read_json(tmp_path / folder / "evaluate" / "metrics.json") for folder in ("streamed", "whole")]
    assert metrics[0]["psnr"] == metrics[1]["psnr"]
    # Outputs are compared in batches of a size that memory allows.
    assert metrics[0]["output_error"] == pytest.approx(metrics[1]["output_error"], rel=1e-3)
