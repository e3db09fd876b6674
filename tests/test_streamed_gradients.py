"""Sensitivities of the picture of a transformer that is streamed: the same to the bit, in few reads of its weights."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from calib.analysis import gradients, sweep
from calib.analysis.adjoint import Adjoint
from calib.analysis.kept import Kept
from calib.analysis.layers import LayerSummary
from calib.analysis.sensitivities import Of, Sensitivities
from calib.base.errors import CalibError
from calib.base.files import read_json
from calib.base.layout import METRICS
from calib.models.backward_memory import BackwardPlan
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
import pytest
import wide_model
from helpers import contents, run_in, well
from test_streamed import Case, streamed
from tiny_models import draw, enlarged, tiny_model

SUMMARY = LayerSummary(-1.0, 1.0, 0.0, 0.5, {"p01": -0.9, "p99": 0.9}, 100)
#: What is measured, the share of memory for what is kept, and for how many pictures of two a file has room.
WAYS = {"memory": (Of.PICTURE, 1.0, 2), "one picture": (Of.PICTURE, 0.0, 1), "latent": (Of.LATENT, 0.0, 2)}
#: Further ones with texts of different lengths, and activations of another type than weights.
QUICK = (("sd3 bfloat16", "one picture"),)
STRUCTURES = ("sd3", "sd3 bfloat16", "qwen bfloat16", "flux", "zimage", "flux2")
ALL = [
    pytest.param(*both, marks=() if both in QUICK else pytest.mark.slow) for both in itertools.product(STRUCTURES, WAYS)
]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(request.param, model, tmp_path_factory.mktemp("streamed"))


@pytest.fixture(scope="module")
def small(model: DiffusionModel, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of("sd3", model, tmp_path_factory.mktemp("small"))


def case_of(structure: str, model: DiffusionModel, folder: Path) -> Case:
    structure, _, kind = structure.partition(" ")
    dtype, file = mx.bfloat16 if kind else mx.float32, folder / "weights.safetensors"
    whole = tiny_model(model, structure, dtype)
    return Case(whole, streamed(whole, structure, file, dtype), file, draw(whole, folder / "dataset"))


def measured(
    case: Case, model: DiffusionModel, home: Path, of: Of = Of.PICTURE, images: Sequence[int] = (0, 1)
) -> Sensitivities:
    layers, states = dict.fromkeys(model.architecture.layers(), SUMMARY), replace(case.states, images=images)
    return gradients.gradient_sensitivities(lambda: model, model.architecture, layers, states, home, of, (64,))


@pytest.mark.parametrize(("case", "way"), ALL, indirect=["case"])
def test_all_that_is_measured_is_the_same(
    case: Case, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with all weights in memory, picture by picture and a block at a time."""
    of, share, pictures = WAYS[way]
    with monkeypatch.context() as patch:
        patch.setattr(gradients, "plan_backward", lambda *_: BackwardPlan(1, by_parts=True, nbytes=0))
        whole = measured(case, case.whole, tmp_path / "whole", of)
    needs: list[int] = []
    kept_bytes = Adjoint.kept_bytes
    monkeypatch.setattr(Adjoint, "kept_bytes", lambda *given: needs.append(kept_bytes(*given)) or needs[-1])
    monkeypatch.setattr(sweep, "OF_MEMORY", share)
    monkeypatch.setattr(sweep, "free_bytes", lambda folder: (sum(needs[:pictures]) + 1) / sweep.OF_DISK)
    found, home = measured(case, case.model, tmp_path / "streamed", of), tmp_path / "streamed"
    err = capsys.readouterr().err
    assert err.count(" at once: keeps ") == -(-2 // pictures) and (f"in {home}" in err) == (share == 0)
    for kind in ("weights", "activations"):
        first, second = (getattr(each, kind) for each in (whole, found))
        assert first.keys() == second.keys() and len(first) > 5
        for name, own in first.items():
            assert own.keys() == second[name].keys(), name
            assert all(np.array_equal(own[option], second[name][option]) for option in own), name
        assert sum(value.any() for own in first.values() for value in own.values()) > 20
    assert whole.importance and whole.importance.keys() == found.importance.keys()
    assert all(np.array_equal(whole.importance[name], found.importance[name]) for name in whole.importance)
    assert whole.reach is not None and found.reach is not None and whole.doubt == found.doubt
    assert np.array_equal(whole.reach.latent, found.reach.latent)
    assert np.array_equal(whole.reach.output, found.reach.output)
    assert sorted(path.suffix for path in home.rglob("*") if path.is_file()) == [".lock", *[".npz"] * 2]


def test_what_is_kept_has_no_name(tmp_path: Path) -> None:
    """So that nothing is left of it, however the process ends; it comes back to the bit."""
    own, random = Kept(1 << 20, tmp_path), np.random.RandomState(0)
    arrays = {i: [mx.array(random.randn(*shape)) for shape in ((3, i + 1), (), (2, 0, 3))] for i in range(3)}
    for key, values in arrays.items():
        own.put(key, values)
    for key, values in reversed(arrays.items()):
        assert [x.shape for x in own.get(key)] == [x.shape for x in values]
        assert all(mx.array_equal(a, b) for a, b in zip(own.get(key), values, strict=True))
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match=r"No space left on device.*"):
        Kept(1 << 60, tmp_path)


def test_too_little_room_for_one_picture(small: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "OF_MEMORY", 0)
    monkeypatch.setattr(sweep, "free_bytes", lambda folder: 10**6)
    with pytest.raises(CalibError) as error:
        measured(small, small.model, tmp_path)
    said = str(error.value)
    assert said.startswith("gradients of one picture keep 1.") and f"MB at {tmp_path}" in said and "\n" not in said
    assert "of whose disk 1.0 MB are free; name a cache_dir with more, or choose a smaller sampler.image_size" in said


def test_no_gradient_outlasts_its_block_and_weights_are_read_seldom(
    tmp_path: Path, model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read once for the forwards of all pictures and steps, and once for each step back."""
    file, depth = tmp_path / "weights.safetensors", 6
    wide_model.write(file, width=256, depth=depth)
    own = replace(wide_model.load("wide", 1.0, (64, 64), str(file), 256, depth, stream=True), decode_latents=enlarged)
    case = Case(own, own, file, draw(own, tmp_path / "dataset"))
    monkeypatch.setattr(gradients, "shares_of", lambda layers, options: [mx.array(1.0)] * len(options))
    weights, counter = own.streamed, Path("/proc/self/io")
    assert weights is not None and own.fingerprint
    weights.release()

    def read() -> int:
        return int(counter.read_text().split()[1]) if counter.exists() else 0

    before, first = mx.get_active_memory(), read()
    mx.reset_peak_memory()
    measured(case, own, tmp_path / "cache", images=[0])
    taken, reads = mx.get_peak_memory() - before, (read() - first) / weights.bytes_read
    assert not counter.exists() or 5 <= reads < 6
    assert taken < 2 * weights.bytes_read, "all gradients, in float32"


@pytest.mark.parametrize(
    "some",
    [
        ("taps.include=['x_embedder','mm_block_3.image.attn.*']", "sampler.num_steps=2", "evaluation=none"),
        pytest.param(("evaluation.num_images=1", "evaluation.steps=1"), marks=pytest.mark.slow),
    ],
    ids=["few layers", "all"],
)
def test_the_job_by_its_defaults(some: Sequence[str], folder: Path) -> None:
    """The same plan and the same bytes."""
    job = ("sampler.num_steps=4", "timestep_schedule=all", "sampler.batch_size=2", "num_images=1", *some)
    found = []
    for name, stream in (("streamed", "true"), ("whole", "null")):
        here = ("data_dir=data", "cache_dir=cache", "hydra.run.dir=run")
        (folder / name).mkdir()
        outcome = well(run_in(folder / name, *job, *here, "report=none", f"model.stream={stream}"))
        assert (" at once: keeps " in outcome.err) == (stream == "true")
        found.append(contents(folder / name))
    one, other = found
    same_files = ("run/quantization_config.json", "run/quantized/model.safetensors", "run/layer_statistics.json")
    for name in (*same_files, *(name for name in one if name.startswith("data/"))):
        assert one[name] == other[name], name
    first, second = (read_json(folder / name / "run" / METRICS) for name in ("streamed", "whole"))
    assert first.get("psnr") == second.get("psnr")
    assert first["predicted_psnr"] == pytest.approx(second["predicted_psnr"], rel=1e-5)


@pytest.mark.parametrize("fault", ["not finite", "truncated"])
def test_faults_are_named_in_one_line(
    fault: str, model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("sd3", model, tmp_path)
    if fault == "truncated":
        content = case.file.read_bytes()
        case.file.write_bytes(content[: len(content) * 2 // 3])
        monkeypatch.setattr(gradients, "shares_of", lambda layers, options: [mx.array(1.0)] * len(options))
        with pytest.raises(CalibError, match=f"^{case.file}: cannot be read to its end") as error:
            measured(case, case.model, tmp_path / "cache")
    else:
        path, far = case.whole.architecture.path("mm_block_1.image.attn.v_proj"), float("inf")
        with (
            case.model.changed(lambda own, w: w * far if own.startswith(path) else w),
            pytest.raises(CalibError, match=r"first the input of mm_block_1\.image\.attn\.o_proj$") as error,
        ):
            measured(case, case.model, tmp_path / "cache")
        assert str(error.value).startswith("the gradient of the picture at step 3 is not finite, ")
    assert "\n" not in str(error.value)
