"""SD3 and FLUX from stand-ins of the hub's repositories: loading, text encoders, and what is missing or wrong."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import calib
from calib.base import progress
from calib.base.errors import CalibError
from calib.dataset.load import load_manifest
from calib.models import memory
from calib.models.diffusionkit import (
    FLUX_UNUSED,
    flux_config,
    flux_weights,
    load_flux,
    load_sd3,
    load_vae_decoder,
    sd3_config,
    sd3_weights,
)
from calib.models.memory import nbytes
from calib.models.model import DiffusionModel, ModelDtype
from calib.models.tensors import checked
from calib.models.text import clip, t5
from calib.models.tokens import BYTE_LETTERS, ClipTokenizer

import h5py
import make_standin_checkpoint as standin
import mlx.core as mx
import numpy as np
import pytest
from diffusionkit.mlx import DiffusionPipeline, FluxPipeline, model_io
from diffusionkit.mlx.mmdit import MMDiT
from helpers import CHECKOUT, environment, is_one_clear_line, run_in, run_process
from huggingface_hub import constants
from mlx.utils import tree_flatten
from standins import FLUX, SD3, small_hub

assert calib.__version__

TEXTS = ("a red fox", "Côte d'Azur 日本 🎉, at 10\x00am", "")
LONG = "an old lighthouse on a rocky coast at dusk, " * 12


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Both models' repositories; the hub's client reads them and nothing else."""
    folder = tmp_path_factory.mktemp("hub")
    with small_hub(folder):
        yield folder


def load(which: str, dtype: ModelDtype = ModelDtype.FLOAT32) -> DiffusionModel:
    if which == "flux":
        return load_flux("flux_schnell", FLUX, dtype=dtype, image_size=(32, 32))
    return load_sd3("sd3_medium", SD3, use_t5=which == "sd3 with T5", dtype=dtype, image_size=(32, 32))


@pytest.fixture(scope="module", params=["sd3", "sd3 with T5", "flux"])
def which(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def model(cache: Path, which: str) -> DiffusionModel:
    return load(which)


def diffusionkits(which: str) -> DiffusionPipeline:
    """DiffusionKit's pipeline with the text encoders and tokenizers of its own loaders."""
    pipeline = object.__new__(FluxPipeline if which == "flux" else DiffusionPipeline)
    pipeline.model_version = FLUX if which == "flux" else SD3
    pipeline.model = model_io._DEFAULT_MODEL
    pipeline.mmdit = pipeline.decoder = pipeline.encoder = None
    pipeline.dtype, pipeline.float16_dtype = mx.float32, mx.float16
    pipeline.use_clip_g, pipeline.use_t5, pipeline.low_memory_mode = which != "flux", which != "sd3", False
    pipeline.check_and_load_models()
    return pipeline


def difference(a: mx.array, b: mx.array) -> float:
    return float(mx.max(mx.abs(a - b)))


def test_text_is_what_diffusionkit_makes_of_it(model: DiffusionModel, which: str) -> None:
    pipeline, guidance = diffusionkits(which), which != "flux"
    for text in ("a red fox", "", "Two SHIPS, at 10 o'clock!", LONG):
        tokens, pooled = pipeline.encode_text(text, 5.0, "")
        ours = model.encode([text], cfg_weight=5.0 if guidance else 0.0)
        assert ours.tokens.shape == tokens.shape == (1 + guidance, model.text_length, 4096)
        assert difference(ours.tokens, tokens) <= 1e-4 and difference(ours.pooled, pooled) <= 1e-4
        assert mx.all(mx.isfinite(ours.tokens)) and float(ours.pooled.std()) > 0.01


def test_a_batch_has_all_conditional_rows_then_all_unconditional_ones(model: DiffusionModel) -> None:
    cfg_weight = 5.0 if model.supports_guidance else 0.0
    text = model.encode([*TEXTS, TEXTS[0]], cfg_weight)
    single = [model.encode([prompt], 0.0) for prompt in (*TEXTS, TEXTS[0], *[""] * 4)]
    for row, expected in enumerate(single[: len(text.tokens)]):
        assert mx.array_equal(text.tokens[row], expected.tokens[0])
        assert mx.array_equal(text.pooled[row], expected.pooled[0])
    assert len(text.tokens) == (8 if cfg_weight else 4)


def test_text_encoders_can_be_unloaded_and_come_back_the_same(model: DiffusionModel) -> None:
    model._rows.clear()
    before = model.encode(TEXTS, 0.0)
    mx.eval(before.tokens, before.pooled)
    loaded = mx.get_active_memory()
    model.unload_text()
    freed = loaded - mx.get_active_memory()
    assert 0.9 * model.text_bytes <= freed <= 1.1 * model.text_bytes
    model._rows.clear()
    again = model.encode(TEXTS, 0.0)
    assert mx.array_equal(before.tokens, again.tokens) and mx.array_equal(before.pooled, again.pooled)
    model.unload_text()
    model.unload_text()


def test_each_distinct_prompt_is_encoded_once(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda text: (seen.append(text), encode(text))[1])
    model._rows.clear()
    for _ in range(2):
        model.encode(["x", "y", "x", ""], 5.0)
    assert seen == ["x", "y", ""]


def test_long_prompts_are_counted_and_cut_in_silence(model: DiffusionModel, which: str, caplog, capfd) -> None:
    assert model.max_prompt_tokens == (256 if which == "flux" else 77)
    assert model.token_count("a red fox") < model.max_prompt_tokens < model.token_count(LONG * 4)
    model.encode([LONG * 4], 0.0)
    assert capfd.readouterr() == ("", "") and not caplog.records


@pytest.mark.parametrize("dtype", [ModelDtype.FLOAT16, ModelDtype.BFLOAT16])
def test_a_16_bit_model_draws_and_a_cpu_says_what_that_costs(
    cache: Path, which: str, dtype: ModelDtype, capsys: pytest.CaptureFixture[str]
) -> None:
    progress.note.cache_clear()
    model = load(which, dtype)
    assert {w.dtype for _, w in tree_flatten(model.transformer.parameters())} <= {dtype.mlx, mx.float32}
    assert nbytes(model.decoder) == sum(w.size for _, w in tree_flatten(model.decoder.parameters())) * 2
    cfg_weight = 5.0 if model.supports_guidance else 0.0
    text = model.encode(["a red fox"], cfg_weight)
    assert text.tokens.dtype == text.pooled.dtype == dtype.mlx
    timestep = mx.array(500.0, dtype.mlx)
    mx.eval(timestep)
    x = mx.random.normal((1, *model.latent_shape))
    image = np.array(model.decode(model.denoise(x, timestep, mx.array(0.5), text, cfg_weight)))
    assert image.shape == (1, 32, 32, 3) and np.isfinite(image).all() and image.std() > 0.01
    if mx.default_device().type == mx.DeviceType.cpu:
        assert f"note: model.dtype={dtype}" in capsys.readouterr().err


def test_a_transformer_that_exceeds_the_memory_is_noted_before_it_is_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress.note.cache_clear()
    monkeypatch.setattr(memory, "device_memory", lambda: 10**6)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nowhere")
    with pytest.raises(CalibError, match="not in the cache /nowhere"):
        load("flux")
    assert re.search(
        r"note: memory: the transformer of flux_schnell alone takes .* of 0\.0 GB", capsys.readouterr().err
    )


def test_the_program_for_fewer_blocks_starts() -> None:
    program = [sys.executable, "-c", standin.flux_code((1, 2)), "--version"]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True)
    assert done.stdout == f"calib {calib.__version__}\n", done.stderr


def test_diffusionkits_own_vae_encoder_reads_the_standin(cache: Path) -> None:
    encoder = model_io.load_vae_encoder(key=SD3)
    assert encoder(mx.zeros((1, 32, 32, 3))).shape == (1, 4, 4, 32)


@pytest.mark.parametrize(
    ("which", "file", "change"),
    [
        ("sd3", "clip_g/model.fp16.safetensors", "drop"),
        ("sd3", "clip_l/model.fp16.safetensors", "reshape"),
        ("sd3 with T5", "t5/t5xxl.safetensors", "drop"),
        ("sd3 with T5", "t5/t5xxl.safetensors", "reshape"),
        ("sd3", "sd3_medium.safetensors", "truncate"),
        ("sd3", "sd3_medium.safetensors", "drop"),
        ("flux", "flux-schnell.safetensors", "reshape"),
        ("flux", "ae.safetensors", "drop"),
        ("flux", "t5/t5xxl.safetensors", "truncate"),
        ("flux", "clip_l/model.fp16.safetensors", "garbage"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(
    cache: Path, which: str, file: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "hub"
    shutil.copytree(cache, copy, copy_function=os.link)
    (path,) = copy.glob(f"*/snapshots/*/{file}")
    names = ("mlp.fc2.weight", "img_mlp.2.weight", "DenseReluDense.wo.weight", "decoder.conv_in.weight")
    content, weights = path.read_bytes(), dict(mx.load(str(path)))
    key = next(name for name in weights if name.endswith(names))
    path.unlink()
    if change in ("truncate", "garbage"):
        path.write_bytes(content[: len(content) * 2 // 3] if change == "truncate" else b"<html>not found</html>" * 9)
    elif change == "drop":
        mx.save_safetensors(str(path), {name: w for name, w in weights.items() if name != key})
    else:
        mx.save_safetensors(str(path), {**weights, key: weights[key][1:]})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(copy))
    with pytest.raises(CalibError) as raised:
        load(which).encode(["a red fox"], 0.0)
    message = str(raised.value)
    assert str(path) in message and "\n" not in message
    assert change not in ("drop", "reshape") or "tensor '" in message


LARGE = ("sd3_medium.safetensors", "flux-schnell.safetensors", "t5/t5xxl.safetensors")
LOADERS: dict[str, Callable[[str], object]] = {
    "sd3_medium.safetensors": lambda path: (
        checked(MMDiT(sd3_config(SD3)), sd3_weights(path), path),
        load_vae_decoder(path, "first_stage_model.decoder.", mx.float32),
    ),
    "flux-schnell.safetensors": lambda path: checked(
        MMDiT(flux_config()), flux_weights(path, flux_config()), path, FLUX_UNUSED
    ),
    "ae.safetensors": lambda path: load_vae_decoder(path, "decoder.", mx.float32),
    "clip_g/model.fp16.safetensors": lambda path: replace(clip("clip_g"), path=path).load(mx.float32),
    "t5/t5xxl.safetensors": lambda path: replace(t5(), path=path).load(mx.float32),
}


#: Files, and of how many tensors one is tried: of large files some by default.
TRIED = [
    *((file, 16 if file in LARGE else 1) for file in LOADERS),
    *(pytest.param(file, 1, marks=pytest.mark.slow) for file in LARGE),
]


@pytest.mark.parametrize(("file", "every"), TRIED)
def test_whichever_tensor_is_missing_or_misshapen_one_line_says_so(
    cache: Path, file: str, every: int, tmp_path: Path
) -> None:
    weights = dict(mx.load(str(next(cache.glob(f"*/snapshots/*/{file}")))))
    path = tmp_path / "damaged.safetensors"
    unread = ("first_stage_model.encoder.", "shared.") + (("encoder.",) if file == "ae.safetensors" else ())
    for name in [name for name in weights if not name.startswith(unread)][::every]:
        w = weights[name]
        shapes = {
            "longer": mx.concatenate([w, w]),
            "wider": mx.concatenate([w, w], axis=-1),
            "flat": w.flatten() if w.ndim > 1 else w[None],
        }
        for change, value in {"missing": None, **shapes}.items():
            changed = {**weights, name: value}
            mx.save_safetensors(str(path), {n: x for n, x in changed.items() if x is not None})
            with pytest.raises(CalibError) as raised:
                LOADERS[file](str(path))
            message = str(raised.value)
            assert message.startswith(f"{path}: ") and "\n" not in message, (name, change)


@pytest.mark.parametrize(
    ("which", "repository", "file"),
    [
        ("sd3", SD3, "sd3_medium.safetensors"),
        ("sd3", "argmaxinc/stable-diffusion", "clip_g/config.json"),
        ("flux", "argmaxinc/stable-diffusion", "t5/t5xxl.safetensors"),
        ("sd3 with T5", "google/t5-v1_1-xxl", "spiece.model"),
        ("flux", FLUX, "ae.safetensors"),
    ],
)
def test_a_file_that_is_not_in_the_cache_is_named_when_offline(
    cache: Path, which: str, repository: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "hub"
    shutil.copytree(cache, copy, copy_function=os.link)
    next(copy.glob(f"models--{repository.replace('/', '--')}/snapshots/*/{file}")).unlink()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(copy))
    with pytest.raises(CalibError) as raised:
        load(which)
    assert str(raised.value).startswith(f"{repository}/{file}: not in the cache {copy}, and HF_HUB_OFFLINE is set")
    assert "\n" not in str(raised.value)


def test_a_local_checkpoint_needs_no_transformer_on_the_hub(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "hub"
    shutil.copytree(cache, copy, copy_function=os.link)
    (path,) = copy.glob("*/snapshots/*/sd3_medium.safetensors")
    local = path.rename(tmp_path / "mine.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(copy))
    loaded = load_sd3("sd3_medium", SD3, str(local), use_t5=False, dtype=ModelDtype.FLOAT32, image_size=(32, 32))
    assert mx.all(mx.isfinite(loaded.encode(["x"], 0.0).pooled))


SD3_JOB = ("generate", "model=sd3_medium", "model.dtype=float32", "num_images=1", "report=none")


class Answer(BaseHTTPRequestHandler):
    """A hub that answers every request alike."""

    def __init__(self, status: int, code: str, *arguments: object) -> None:
        self.status, self.code = status, code
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.send_response(self.status)
        self.send_header("X-Error-Code", self.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a hub on this machine; the parameter is its answer."""
    with HTTPServer(("127.0.0.1", 0), partial(Answer, *request.param)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("hub", "advice"),
    [
        ((403, "GatedRepo"), "its licence was not accepted; accept it on {hub}/" + SD3 + ", `hf auth login`"),
        pytest.param(
            (401, "GatedRepo"),
            "its licence was not accepted; accept it on {hub}/" + SD3 + ", `hf auth login`",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (401, ""), "the hub refuses access; see {hub}/" + SD3 + ", `hf auth login`", marks=pytest.mark.slow
        ),
        pytest.param((404, "RepoNotFound"), "the hub shows no such repository", marks=pytest.mark.slow),
    ],
    indirect=["hub"],
)
def test_what_the_hub_refuses_is_said_in_one_line(
    hub: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    outcome = run_process(tmp_path, *SD3_JOB)
    line = is_one_clear_line(outcome, status=1)
    assert line.startswith(f"{SD3}/sd3_medium.safetensors: {advice.format(hub=hub)}")
    assert line.endswith("; or give model.checkpoint=FILE")


def test_offline_without_a_cache_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    outcome = run_in(tmp_path, *SD3_JOB, "sampler.image_size=[64,64]")
    line = is_one_clear_line(outcome, status=1)
    assert line.startswith(f"{SD3}/sd3_medium.safetensors: not in the cache {tmp_path / 'hub'}, and HF_HUB_OFFLINE")


def test_clip_tokens_are_openais(cache: Path) -> None:
    plain = model_io.load_tokenizer(vocab_key="tokenizer_l_vocab", merges_key="tokenizer_l_merges")
    tokenizer = ClipTokenizer(plain)
    assert len(set(BYTE_LETTERS)) == 256 and not any(letter.isspace() for letter in BYTE_LETTERS)
    printable = "".join(chr(c) for c in range(32, 127))
    for text in ("", "A red  fox's\tden, 24 x 7!", printable):
        assert tokenizer.tokenize(text) == plain.tokenize(text)
    letters = {token: i for token, i in plain.vocab.items() if len(token) == 1}
    begin, *tokens, end = tokenizer.tokenize("日")
    assert tokens == [letters["æ"], letters["Ĺ"], plain.vocab["¥</w>"]], "the bytes E6 97 A5"
    assert (begin, end) == (plain.bos_token, plain.eos_token)
    assert tokenizer.tokenize("e\u0301té") == tokenizer.tokenize("été") == tokenizer.tokenize("ÉTÉ")
    every = "".join(chr(c) for c in range(0x2000) if not 0xD800 <= c < 0xE000) + "\U0001f389\ud800"
    assert all(0 <= token < 49408 for token in tokenizer.tokenize(every))


def test_the_vocabulary_of_the_standin_has_clips_size(cache: Path) -> None:
    (path,) = cache.glob("*/snapshots/*/tokenizer_g/vocab.json")
    vocabulary = json.loads(path.read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(49408))
    assert vocabulary["<|endoftext|>"] == 49407 == max(vocabulary.values()), "CLIP pools at the largest id"


def test_the_standin_does_not_overwrite_what_came_from_the_hub(tmp_path: Path) -> None:
    main = tmp_path / f"models--{SD3.replace('/', '--')}" / "refs" / "main"
    main.parent.mkdir(parents=True)
    main.write_text("0" * 40)
    with pytest.raises(SystemExit, match="holds files of the hub"):
        standin.write_transformer(tmp_path, SD3)


@pytest.mark.slow
def test_sd3_medium_in_full_size_draws_offline(tmp_path: Path) -> None:
    """``CALIB_STANDIN`` names a folder to keep the 6 GB in, or to take them from."""
    cache = Path(os.environ.get("CALIB_STANDIN", tmp_path / "hub"))
    script = CHECKOUT / "scripts" / "make_standin_checkpoint.py"
    if not cache.exists():
        subprocess.run([sys.executable, str(script), str(cache)], env=environment(), check=True)
    start = time.monotonic()
    arguments = "model=sd3_medium model.use_t5=false model.dtype=float32 prompts=builtin num_images=1 data_dir=dataset"
    sampler = "sampler.num_steps=2 sampler.image_size=[256,256] sampler.batch_size=1"
    command = [sys.executable, "-m", "calib", "generate", *arguments.split(), *sampler.split()]
    offline = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment() | offline, check=True)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"\nSD3-medium, 1 image, 2 steps, 256 px: {seconds:.0f} s, at most {peak / 1e9:.1f} GB")
    manifest = load_manifest(tmp_path / "dataset")
    assert list(manifest.images) == [0]
    with h5py.File(tmp_path / "dataset" / manifest.images[0].samples[0]) as file:
        assert file["x"].shape == (3, 32, 32, 16)
        assert np.isfinite(file["x"][:]).all()
    latent = np.load(tmp_path / "dataset" / "latents" / "0000.npy")
    assert latent.shape == (32, 32, 16) and np.isfinite(latent).all() and latent.std() > 0.1
    assert peak < 15.5e9, "it must run on a 16 GB machine"
