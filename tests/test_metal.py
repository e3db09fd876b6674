"""What a Mac would run: every stage's operations have Metal kernels, and one without is found."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import calib
from calib.base.graphs import watched
from calib.base.metal import Operation, kernels, lacking, stored
from calib.cli import selftest, selftest_metal
from calib.cli.doctor import doctor_command
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
import pytest
from helpers import run_in, well
from standins import small_hub

assert calib.__version__

SMALL = (
    *("num_images=1", "sampler.num_steps=1", "sampler.batch_size=1", "timestep_schedule=all", "report=none"),
    *("sensitivity.images=1", "sensitivity.steps=1", "sensitivity.group_sizes=[64]", "data_dir=dataset"),
    *("calibration.images=1", "calibration.steps=1", "evaluation.num_images=1", "evaluation.steps=1"),
    *("taps=all", "taps.include=['*_1','*_0.image.attn.q_proj','*_1.*fc2','*_0.text.adaln','final_layer.linear']"),
)
TINY = (
    *(*SMALL, "model._target_=tiny_models.load", "~model.skeleton", "+model.structure=${model.name}"),
    *("analysis=allocate", "ranges=per_step", "storage=sampled"),
)
SD3 = (*TINY, "model.name=sd3", "model.dtype=float16")
FLUX = (*TINY, "model.name=flux", "model.dtype=bfloat16", "sampler.cfg_weight=0")
DRAWN = ("generate", *SMALL, "sampler.image_size=[32,32]", "prompts=builtin")

#: Commands, each after those before it.
JOBS: dict[str, list[tuple[str, ...]]] = {
    "emoji": [(*SMALL, "analysis=uniform", "hydra.run.dir=run")],
    "SD3": [
        (*SD3, "quantizer=gptq", "hydra.run.dir=run"),
        ("quantize", *SD3, "plan=run", "quantizer=percentile", "hydra.run.dir=again"),
    ],
    "FLUX": [(*FLUX, "quantizer=smooth", "hydra.run.dir=run")],
    "SD3's text encoders and decoder": [(*DRAWN, "model=sd3_medium")],
    "FLUX's text encoders and decoder": [(*DRAWN, "model=flux_schnell")],
}
#: Some of what is seen if nothing is overlooked, and what a Mac does is done.
SEEN = {"AddMM", "LayerNorm", "ScaledDotProductAttention"}
SEEN_IN_JOBS = {"Depends", "Quantize", "QuantizedMatmul", "Scatter"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with small_hub(tmp_path_factory.mktemp("hub")):
        yield


SLOW = ("SD3", "FLUX")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in JOBS])
def test_metal_has_kernels_for_every_stage(name: str, hub: None, tmp_path: Path) -> None:
    with watched() as graphs:
        for command in JOBS[name]:
            well(run_in(tmp_path, *command))
    assert graphs.lacking == {}
    seen = {operation.name for operation in graphs.operations}
    assert seen >= (SEEN if "decoder" in name else SEEN | SEEN_IN_JOBS)


# It can fail


def ones(dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.ones((4, 4), dtype=dtype)


#: Something that Metal lacks, on a stream; and what is said of it.
LACKING: dict[str, tuple[Callable[[Any], mx.array], str]] = {
    "float64": (lambda s: ones().astype(mx.float64, stream=s), "AsType of float32: float64 is not supported"),
    "qr": (lambda s: mx.linalg.qr(ones(), stream=s)[0], "QRF of float32: no kernel"),
    "svd": (lambda s: mx.linalg.svd(ones(), stream=s)[1], "SVD of float32: no kernel"),
    "inverse": (lambda s: mx.linalg.inv(mx.eye(4), stream=s), "Inverse of float32: no kernel"),
    "cholesky": (lambda s: mx.linalg.cholesky(mx.eye(4), stream=s), "Cholesky of float32: no kernel"),
    "eigh": (lambda s: mx.linalg.eigh(mx.eye(4), stream=s)[0], "Eigh of float32: no kernel"),
    "sort of bool": (lambda s: mx.sort(ones() > 0, stream=s), "Sort of bool_: no kernel"),
    "scatter of int64": (
        lambda s: mx.put_along_axis(ones(mx.int64), ones(mx.int32), ones(mx.int64), axis=0, stream=s),
        "ScatterAxis of int64, int32: a GPU scatter takes no 64-bit values",
    ),
    "in the middle": (
        lambda s: mx.sum(mx.linalg.qr(ones() + 1, stream=s)[1] * 2).astype(mx.float16),
        "QRF of float32: no kernel",
    ),
}


@pytest.mark.parametrize("where", ["default stream", "stream=mx.cpu", "with mx.stream(mx.cpu)"])
@pytest.mark.parametrize("name", LACKING)
def test_what_metal_lacks_is_found_unless_it_is_on_the_cpu_by_intention(name: str, where: str) -> None:
    make, said = LACKING[name]
    with watched() as graphs:
        if where == "with mx.stream(mx.cpu)":
            with mx.stream(mx.cpu):
                mx.eval(make(None))
        else:
            mx.eval(make(mx.cpu if where == "stream=mx.cpu" else None))
    if where == "default stream":
        places = [place for what, place in graphs.lacking.items() if what.startswith(said)]
        assert places and places[0].startswith(f"{__file__}:")
    else:
        assert graphs.lacking == {}


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        (Operation("Quantize", ("float16",), ("uint32", "float16", "float16"), (16, 4, 0, False)), "gs_16_b_4"),
        (
            Operation("Quantize", ("uint32", "float32"), ("float32",), (64, 7, 0, True)),
            "affine_dequantize_float_gs_64_b_7",
        ),
        (Operation("QuantizedMatmul", ("float32", "uint32"), ("float32",), (128, 4, 1, True)), "mxfp4_qmm_t"),
        (Operation("Scatter", ("float32", *["int32"] * 21, "float32"), ("float32",)), "more than 20 arrays of indices"),
        (Operation("Gather", ("float32", *["int32"] * 21), ("float32",)), "more than 20 arrays of indices"),
        (Operation("Matmul", ("int32", "int32"), ("int32",)), "steel_gemm_fused_nn_int32_int32"),
        (Operation("LayerNorm", ("int8",), ("int8",)), "layer_normint8"),
        (Operation("CustomKernel", ("float32",), ("float32",)), "CustomKernel"),
    ],
    ids=lambda value: str(value).partition(" of ")[0] if isinstance(value, Operation) else "",
)
def test_what_mlx_makes_nowhere_is_refused_as_well(operation: Operation, said: str) -> None:
    assert said in lacking(operation, kernels())


def test_nothing_is_computed_unseen_and_nothing_stays_behind() -> None:
    before = (mx.cpu, mx.eval, np.array, mx.array.item, mx.default_device(), mx.metal.is_available())
    with watched() as graphs:
        hidden, noise = mx.ones((4,)) + 1, mx.random.normal((4,))
        with pytest.raises(RuntimeError, match="no Stream"):
            memoryview(hidden)
        assert np.array(hidden + noise).shape == (4,) and float(hidden[0]) == 2
        assert {"Add", "ErfInv", "RandomBits"} <= {operation.name for operation in graphs.operations}
    assert (mx.cpu, mx.eval, np.array, mx.array.item, mx.default_device(), mx.metal.is_available()) == before
    assert np.isfinite(np.array(mx.random.normal((4,)))).all()


# The names of kernels


def test_the_names_are_those_of_this_mlx() -> None:
    assert stored()[0] == mx.__version__, "renew them: scripts/list_metal_kernels.py"


def library(names: list[str]) -> bytes:
    """A Metal library of these kernels, without their code."""
    entries = b""
    for name in names:
        tag = b"NAME" + struct.pack("<H", len(name) + 1) + name.encode() + b"\0TYPE\x01\0\x02ENDT"
        entries += struct.pack("<I", len(tag)) + tag
    functions = struct.pack("<I", len(names)) + entries
    return b"MTLB".ljust(24) + struct.pack("<QQ", 40, len(functions)) + functions + b"NAME\x05\0code\0"


@pytest.mark.parametrize("ahead", [True, False], ids=["compiled ahead", "compiled when needed"])
def test_a_mac_s_own_library_is_read(ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["gemv_float32_bm1_bn8_sm1_sn32_tm4_tn4_nc0_axpby0", "arangeuint8", "sdpa_vector_bfloat16_t_64_64"]
    names += ["vv_Addfloat32", "g2_Addfloat32", "affine_qmm_t_float16_t_gs_64_b_3_alN_true_batch_0"] * ahead
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "mlx.metallib").write_bytes(library(names))
    monkeypatch.setattr(mx, "__file__", str(tmp_path / "core.so"))
    own = {"gemv_float32", "arangeuint8", "sdpa_vector_bfloat16_t", "vv_Addfloat32", "affine_qmm_t_float16_t_gs_64_b_3"}
    assert kernels() == (own if ahead else stored()[1])


# The self-test


def test_the_selftest_names_what_metal_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def factorise(model: DiffusionModel) -> None:
        weight = model.architecture.layers()["context_embedder"].weight
        mx.eval(mx.linalg.svd(weight.astype(mx.float32))[1])

    monkeypatch.setattr(selftest, "GROUPS", {"Metal kernels": selftest_metal.check_metal})
    monkeypatch.setattr(selftest_metal, "MODELS", {"SD3 in small": selftest_metal.MODELS["SD3 in small"]})
    assert doctor_command(["--selftest"]) == 0
    assert "ok    Metal has kernels: SD3 in small, " in capsys.readouterr().out
    monkeypatch.setattr(selftest_metal, "exercise", factorise)
    assert doctor_command(["--selftest"]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "FAIL " in line)
    assert "SVD of float32: no kernel v_SVDfloat32float32 is known" in line and f"{__file__}:" in line
