"""SD3 and FLUX through the adapter: tiny checkpoints in the original naming, read, run and compared."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import calib
from calib.activations.taps import TapKind, TapSelection, tap_points, tapped
from calib.base.errors import CalibError, ConfigError
from calib.models import compat
from calib.models.diffusionkit import (
    FLUX_UNUSED,
    SD3_PREFIX,
    flux_skeleton,
    flux_weights,
    load_vae_decoder,
    sd3_skeleton,
    sd3_weights,
)
from calib.models.hub import load_checked
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.mmdit.names import layer_name, module_path
from calib.models.model import weights, weights_fingerprint

import mlx.core as mx
import numpy as np
import original_naming
import pytest
from diffusionkit.mlx.config import FLUX_SCHNELL, SD3_8b, VAEDecoderConfig
from diffusionkit.mlx.mmdit import MMDiT
from diffusionkit.mlx.vae import VAEDecoder
from helpers import velocity
from mlx.utils import tree_flatten
from watching import keep

assert calib and compat

SIZES = {"hidden_size_override": 128, "num_heads": 2, "pooled_text_embed_dim": 32, "token_level_text_embed_dim": 64}
SD3 = replace(SD3_8b, depth_multimodal=2, max_latent_resolution=8, low_memory_mode=False, dtype=mx.float32, **SIZES)
FLUX = replace(
    FLUX_SCHNELL,
    depth_multimodal=1,
    depth_unified=2,
    rope_axes_dim=(16, 24, 24),
    low_memory_mode=False,
    dtype=mx.float32,
    **SIZES,
)


def random_weights(module: MMDiT) -> dict[str, mx.array]:
    rng = np.random.RandomState(0)
    return {n: mx.array(0.05 * rng.randn(*p.shape).astype(np.float32)) for n, p in tree_flatten(module.parameters())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def sd3(folder: Path) -> tuple[MMDiT, Path]:
    model = MMDiT(SD3)
    random = random_weights(model)
    model.load_weights(list(random.items()))
    mx.save_safetensors(str(folder / "sd3.safetensors"), original_naming.sd3(random))
    return model, folder / "sd3.safetensors"


@pytest.fixture(scope="module")
def flux(folder: Path) -> tuple[MMDiT, Path]:
    model = MMDiT(FLUX)
    weights = random_weights(model)
    for i in range(FLUX.depth_unified):
        name = f"unified_transformer_blocks.{i}.transformer_block.mlp.fc2.bias"
        weights[name] = mx.zeros_like(weights[name])
    model.load_weights(list(weights.items()))
    guidance = {"guidance_in.in_layer.weight": mx.zeros((1,))}  # FLUX.1-dev's
    mx.save_safetensors(str(folder / "flux.safetensors"), original_naming.flux(weights) | guidance)
    return model, folder / "flux.safetensors"


def inputs(rows: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    rng = np.random.RandomState(1)
    x, tokens, pooled = rng.randn(rows, 8, 8, 16), rng.randn(rows, 5, 64), rng.randn(rows, 32)
    timestep = mx.array(500.0)
    mx.eval(timestep)
    return *(mx.array(a.astype(np.float32)) for a in (x, tokens, pooled)), timestep


@pytest.mark.parametrize("which", ["sd3", "flux"])
def test_original_naming(which: str, request: pytest.FixtureRequest) -> None:
    expected, path = request.getfixturevalue(which)
    loaded, read = (
        (MMDiT(SD3), sd3_weights(str(path))) if which == "sd3" else (MMDiT(FLUX), flux_weights(str(path), FLUX))
    )
    load_checked(loaded, read, mx.float32, str(path), FLUX_UNUSED)
    assert weights_fingerprint(loaded) == weights_fingerprint(expected)
    assert mx.array_equal(velocity(loaded, *inputs(2)), velocity(expected, *inputs(2)))


@pytest.mark.parametrize("which", ["sd3", "flux"])
@pytest.mark.parametrize("rows", [1, 3])
def test_velocity_equals_diffusionkits(which: str, rows: int, request: pytest.FixtureRequest) -> None:
    model, _ = request.getfixturevalue(which)
    x, tokens, pooled, timestep = inputs(rows)
    ours = velocity(model, x, tokens, pooled, timestep)
    copy = MMDiT(model.config)
    copy.load_weights(list(weights(model).items()))
    copy.cache_modulation_params(pooled, timestep.reshape(1))
    theirs = copy(x, tokens[:, :, None, :], mx.broadcast_to(timestep, [rows]))
    assert float(mx.max(mx.abs(ours - theirs))) <= 1e-5


@pytest.mark.parametrize("which", ["sd3", "flux"])
@pytest.mark.parametrize("times", [[500.0], [500.0, 500.0, 500.0], [500.0, 31.25, 0.0]])
def test_no_forward_reads_its_timestep(which: str, times: list[float], request: pytest.FixtureRequest) -> None:
    """On a GPU that would wait for what is being computed; the graph of an array that was read is gone."""
    model, _ = request.getfixturevalue(which)
    x, tokens, pooled, _ = inputs(3)
    timestep = mx.negative(mx.array([-t for t in times]))
    v, graph = velocity(model, x, tokens, pooled, timestep), StringIO()
    mx.export_to_dot(graph, timestep)
    assert "Negative" in graph.getvalue()
    for row, t in enumerate(times * (3 // len(times))):
        alone = velocity(model, *(a[row : row + 1] for a in (x, tokens, pooled)), mx.array(t))
        assert np.max(np.abs(np.array(v[row] - alone[0]))) <= 1e-5


@pytest.mark.parametrize("which", ["sd3", "flux"])
def test_forwards_leave_the_weights(which: str, request: pytest.FixtureRequest) -> None:
    model, _ = request.getfixturevalue(which)
    architecture, before = MMDiTArchitecture(model), weights_fingerprint(model)
    modules = [id(module) for module in model.modules()]
    plain = velocity(model, *inputs(2))
    seen: dict[str, mx.array] = {}
    with tapped(architecture, tap_points(architecture, TapSelection(TapKind.ALL)), keep(seen)):
        observed = velocity(model, *inputs(2))
        mx.eval(observed, list(seen.values()))
    assert mx.array_equal(plain, observed)
    assert weights_fingerprint(model) == before
    assert [id(module) for module in model.modules()] == modules
    assert "y_embedder.0" in seen and "final_layer.linear" in seen
    if which == "flux":
        assert {"unified_block_1.attn.q_proj", "unified_block_1.mlp.fc2", "unified_block_1"} <= set(seen)


def test_unified_blocks_share_a_tap(flux: tuple[MMDiT, Path]) -> None:
    points = {point.name: point for point in tap_points(MMDiTArchitecture(flux[0]), TapSelection())}
    aliases = points["unified_block_0.attn.q_proj"].aliases
    assert set(aliases) == {f"unified_block_0.{layer}" for layer in ("attn.k_proj", "attn.v_proj", "mlp.fc1")}


@pytest.mark.parametrize("which", ["sd3", "flux"])
def test_names_and_paths_are_inverse(which: str, request: pytest.FixtureRequest) -> None:
    model, _ = request.getfixturevalue(which)
    assert all(layer_name(module_path(name)) == name for name in MMDiTArchitecture(model).layers())


@pytest.mark.parametrize("change", ["drop", "add", "reshape", "truncate", "foreign"])
def test_wrong_checkpoints(change: str, sd3: tuple[MMDiT, Path], tmp_path: Path) -> None:
    path = tmp_path / f"{change}.safetensors"
    weights = mx.load(str(sd3[1]))
    key = f"{SD3_PREFIX}joint_blocks.1.x_block.mlp.fc2.weight"
    if change == "drop":
        del weights[key]
    elif change == "add":
        weights[f"{SD3_PREFIX}joint_blocks.9.x_block.mlp.fc2.weight"] = mx.zeros((2,))
    elif change == "reshape":
        weights[key] = weights[key][:, :64]
    elif change == "foreign":
        weights = {"something.weight": mx.zeros((2,))}
    mx.save_safetensors(str(path), weights)
    if change == "truncate":
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CalibError) as raised:
        load_checked(MMDiT(SD3), sd3_weights(str(path)), mx.float32, str(path))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_flux_key_bias_has_no_place(flux: tuple[MMDiT, Path]) -> None:
    names = dict(tree_flatten(flux[0].parameters()))
    assert not any(part in name for name in names for part in FLUX_UNUSED)


def test_vae_in_the_original_naming(folder: Path) -> None:
    config = VAEDecoderConfig()
    decoder = VAEDecoder(config.in_channels, config.out_channels, list(config.block_out_channels))
    weights = random_weights(decoder)
    path = folder / "vae.safetensors"
    mx.save_safetensors(str(path), original_naming.vae(weights, "first_stage_model.decoder."))
    loaded = load_vae_decoder(str(path), "first_stage_model.decoder.", mx.float32)
    decoder.load_weights(list(weights.items()))
    assert weights_fingerprint(loaded) == weights_fingerprint(decoder)


def test_skeletons() -> None:
    repository = "argmaxinc/mlx-stable-diffusion-3-medium"
    layers = sd3_skeleton("sd3_medium", repository).layers()
    assert len([name for name in layers if name.endswith("mlp.fc2")]) == 24 + 23
    layers = flux_skeleton("flux_schnell", "argmaxinc/mlx-FLUX.1-schnell").layers()
    assert len([name for name in layers if name.startswith("unified_block_") and name.endswith("adaln")]) == 38


def test_refused_before_loading() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.cfg_weight=3"):
        flux_skeleton("flux_dev", "argmaxinc/mlx-FLUX.1-dev", cfg_weight=3.0)
    with pytest.raises(ConfigError, match=r"model\.repository=argmaxinc/mlx-FLUX\.1-deev.*Did you mean"):
        flux_skeleton("flux_dev", "argmaxinc/mlx-FLUX.1-deev")
    with pytest.raises(ConfigError, match=r"model\.repository=argmaxinc/mlx-FLUX\.1-schnell: not known for sd3_medium"):
        sd3_skeleton("sd3_medium", "argmaxinc/mlx-FLUX.1-schnell")


def test_quantized_repositories() -> None:
    with pytest.raises(ConfigError, match=r"4-bit already.*: argmaxinc/mlx-stable-diffusion-3\.5-large$"):
        sd3_skeleton("sd35_large", "argmaxinc/mlx-stable-diffusion-3.5-large-4bit-quantized")
    with pytest.raises(ConfigError, match=r"4-bit already.*: argmaxinc/mlx-FLUX\.1-schnell$"):
        flux_skeleton("flux_schnell", "argmaxinc/mlx-FLUX.1-schnell-4bit-quantized")


def test_images_beyond_sd3s_positions() -> None:
    repository = "argmaxinc/mlx-stable-diffusion-3-medium"
    assert sd3_skeleton("sd3_medium", repository, image_size=(1536, 1024))
    with pytest.raises(ConfigError, match=r"sampler\.image_size=\[512, 1552\]: .*at most 1536 pixels"):
        sd3_skeleton("sd3_medium", repository, image_size=(512, 1552))
