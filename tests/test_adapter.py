"""SD3 and FLUX through the adapter: tiny checkpoints in the original naming, read, run and compared."""

from dataclasses import replace
from pathlib import Path

import calib
from calib.activations.taps import TapKind, TapSelection, linear_layers, tap_points, tapped
from calib.errors import CalibError, ConfigError
from calib.models import compat
from calib.models.diffusionkit import (
    FLUX_UNUSED,
    SD3_PREFIX,
    flux_skeleton,
    load_flux_transformer,
    load_sd3_transformer,
    load_vae_decoder,
    sd3_skeleton,
    text_encoder,
)
from calib.models.model import weights, weights_fingerprint
from calib.models.modulation import velocity
from calib.models.names import layer_name, module_path

import mlx.core as mx
import numpy as np
import pytest
from diffusionkit.mlx import DiffusionPipeline, FluxPipeline
from diffusionkit.mlx.clip import CLIPTextModel
from diffusionkit.mlx.config import FLUX_SCHNELL, CLIPTextModelConfig, MMDiTConfig, SD3_8b, VAEDecoderConfig
from diffusionkit.mlx.mmdit import MMDiT
from diffusionkit.mlx.tokenizer import Tokenizer
from diffusionkit.mlx.vae import VAEDecoder
from mlx.utils import tree_flatten

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


def joined(weights: dict[str, mx.array], stem: str, part: str) -> mx.array | None:
    """q, k and v of a layer as the one tensor of the original checkpoints; SD3 and FLUX give k a bias."""
    parts = [weights.get(f"{stem}.{name}_proj.{part}") for name in ("q", "k", "v")]
    if parts[0] is None:
        return None
    return mx.concatenate([parts[0], parts[1] if parts[1] is not None else mx.ones_like(parts[0]), parts[2]])


def sd3_checkpoint(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Stability's naming, the inverse of DiffusionKit's mapping."""
    original = {}
    for name, w in weights.items():
        if any(f".{x}_proj." in name for x in "kv"):
            continue
        if ".q_proj." in name:
            stem, part = name.split(".q_proj.")
            name, w = f"{stem}.qkv.{part}", joined(weights, stem, part)
        name = name.replace("multimodal_transformer_blocks", "joint_blocks").replace("attn.o_proj", "attn.proj")
        name = name.replace("image_transformer_block", "x_block").replace("text_transformer_block", "context_block")
        name = name.replace("qk_norm.q_norm", "attn.ln_q").replace("qk_norm.k_norm", "attn.ln_k")
        name = name.replace("mlp.layers.", "mlp.").replace("adaLN_modulation.layers.", "adaLN_modulation.")
        if name == "x_pos_embedder.pos_embed.weight":
            name, w = "pos_embed", w[None]
        original[SD3_PREFIX + name] = w.transpose(0, 3, 1, 2) if name == "x_embedder.proj.weight" else w
    return original


def flux_checkpoint(weights: dict[str, mx.array], config: MMDiTConfig) -> dict[str, mx.array]:
    """Black Forest Labs' naming, the inverse of DiffusionKit's mapping."""
    original = {"guidance_in.in_layer.weight": mx.zeros((1,))}
    renamed = (
        ("multimodal_transformer_blocks", "double_blocks"),
        ("text_transformer_block.attn.", "txt_attn."),
        ("image_transformer_block.attn.", "img_attn."),
        ("text_transformer_block.mlp.fc1", "txt_mlp.0"),
        ("text_transformer_block.mlp.fc2", "txt_mlp.2"),
        ("image_transformer_block.mlp.fc1", "img_mlp.0"),
        ("image_transformer_block.mlp.fc2", "img_mlp.2"),
        ("image_transformer_block.adaLN_modulation.layers.1", "img_mod.lin"),
        ("text_transformer_block.adaLN_modulation.layers.1", "txt_mod.lin"),
        ("text_transformer_block.qk_norm.q_norm.weight", "txt_attn.norm.query_norm.scale"),
        ("text_transformer_block.qk_norm.k_norm.weight", "txt_attn.norm.key_norm.scale"),
        ("image_transformer_block.qk_norm.q_norm.weight", "img_attn.norm.query_norm.scale"),
        ("image_transformer_block.qk_norm.k_norm.weight", "img_attn.norm.key_norm.scale"),
        ("o_proj", "proj"),
        ("x_embedder.proj.", "img_in."),
        ("context_embedder.", "txt_in."),
        ("t_embedder.", "time_in."),
        ("y_embedder.", "vector_in."),
        ("mlp.layers.0", "in_layer"),
        ("mlp.layers.2", "out_layer"),
        ("adaLN_modulation.layers.1", "adaLN_modulation.1"),
    )
    for name, w in weights.items():
        if name.startswith("unified") or any(f".{x}_proj." in name for x in "kv"):
            continue
        if ".q_proj." in name:
            stem, part = name.split(".q_proj.")
            name, w = f"{stem}.qkv.{part}", joined(weights, stem, part)
        for ours, theirs in renamed:
            name = name.replace(ours, theirs)
        original[name] = w.reshape(w.shape[0], -1) if name == "img_in.weight" else w
    for i in range(config.depth_unified):
        stem, block = f"unified_transformer_blocks.{i}.transformer_block", f"single_blocks.{i}"
        for part in ("weight", "bias"):
            qkv = joined(weights, f"{stem}.attn", part)
            original[f"{block}.linear1.{part}"] = mx.concatenate([qkv, weights[f"{stem}.mlp.fc1.{part}"]])
            original[f"{block}.modulation.lin.{part}"] = weights[f"{stem}.adaLN_modulation.layers.1.{part}"]
        out = [weights[f"{stem}.attn.o_proj.weight"], weights[f"{stem}.mlp.fc2.weight"]]
        original[f"{block}.linear2.weight"] = mx.concatenate(out, axis=1)
        original[f"{block}.linear2.bias"] = weights[f"{stem}.attn.o_proj.bias"]
        for ours, theirs in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            original[f"{block}.norm.{theirs}.scale"] = weights[f"{stem}.qk_norm.{ours}.weight"]
    return original


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def sd3(folder: Path) -> tuple[MMDiT, Path]:
    model = MMDiT(SD3)
    random = random_weights(model)
    model.load_weights(list(random.items()))
    mx.save_safetensors(str(folder / "sd3.safetensors"), sd3_checkpoint(random))
    return model, folder / "sd3.safetensors"


@pytest.fixture(scope="module")
def flux(folder: Path) -> tuple[MMDiT, Path]:
    model = MMDiT(FLUX)
    weights = random_weights(model)
    for i in range(FLUX.depth_unified):
        name = f"unified_transformer_blocks.{i}.transformer_block.mlp.fc2.bias"
        weights[name] = mx.zeros_like(weights[name])
    model.load_weights(list(weights.items()))
    mx.save_safetensors(str(folder / "flux.safetensors"), flux_checkpoint(weights, FLUX))
    return model, folder / "flux.safetensors"


def inputs(rows: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    rng = np.random.RandomState(1)
    x, tokens, pooled = rng.randn(rows, 8, 8, 16), rng.randn(rows, 5, 64), rng.randn(rows, 32)
    timestep = mx.array(500.0)
    mx.eval(timestep)
    return *(mx.array(a.astype(np.float32)) for a in (x, tokens, pooled)), timestep


@pytest.mark.parametrize("which", ["sd3", "flux"])
def test_a_checkpoint_in_the_original_naming_gives_every_weight_back(
    which: str, request: pytest.FixtureRequest
) -> None:
    expected, path = request.getfixturevalue(which)
    load, config = (load_sd3_transformer, SD3) if which == "sd3" else (load_flux_transformer, FLUX)
    loaded = load(str(path), config, mx.float32)
    assert weights_fingerprint(loaded) == weights_fingerprint(expected)
    assert mx.array_equal(velocity(loaded, *inputs(2)), velocity(expected, *inputs(2)))


@pytest.mark.parametrize("which", ["sd3", "flux"])
@pytest.mark.parametrize("rows", [1, 3])
def test_velocity_equals_diffusionkit_with_its_modulation_cache(
    which: str, rows: int, request: pytest.FixtureRequest
) -> None:
    model, _ = request.getfixturevalue(which)
    x, tokens, pooled, timestep = inputs(rows)
    ours = velocity(model, x, tokens, pooled, timestep)
    copy = MMDiT(model.config)
    copy.load_weights(list(weights(model).items()))
    copy.cache_modulation_params(pooled, timestep.reshape(1))
    theirs = copy(x, tokens[:, :, None, :], mx.broadcast_to(timestep, [rows]))
    assert float(mx.max(mx.abs(ours - theirs))) <= 1e-5


@pytest.mark.parametrize("which", ["sd3", "flux"])
def test_forwards_and_taps_leave_the_weights_as_loaded(which: str, request: pytest.FixtureRequest) -> None:
    model, _ = request.getfixturevalue(which)
    before = weights_fingerprint(model)
    modules = [id(module) for module in model.modules()]
    plain = velocity(model, *inputs(2))
    seen: dict[str, mx.array] = {}
    with tapped(model, tap_points(model, TapSelection(TapKind.ALL)), seen.__setitem__):
        observed = velocity(model, *inputs(2))
        mx.eval(observed, list(seen.values()))
    assert mx.array_equal(plain, observed)
    assert weights_fingerprint(model) == before
    assert [id(module) for module in model.modules()] == modules
    assert "y_embedder.0" in seen and "final_layer.linear" in seen
    if which == "flux":
        assert {"unified_block_1.attn.q_proj", "unified_block_1.mlp.fc2", "unified_block_1"} <= set(seen)


def test_flux_shares_one_tap_among_q_k_v_and_fc1_of_a_unified_block(flux: tuple[MMDiT, Path]) -> None:
    points = {point.name: point for point in tap_points(flux[0], TapSelection())}
    aliases = points["unified_block_0.attn.q_proj"].aliases
    assert set(aliases) == {f"unified_block_0.{layer}" for layer in ("attn.k_proj", "attn.v_proj", "mlp.fc1")}


@pytest.mark.parametrize("which", ["sd3", "flux"])
def test_names_and_paths_are_inverse_on_every_linear_layer(which: str, request: pytest.FixtureRequest) -> None:
    model, _ = request.getfixturevalue(which)
    assert all(layer_name(module_path(name)) == name for name in linear_layers(model))


@pytest.mark.parametrize("change", ["drop", "add", "reshape", "truncate", "foreign"])
def test_a_wrong_checkpoint_is_named_in_one_line(change: str, sd3: tuple[MMDiT, Path], tmp_path: Path) -> None:
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
        load_sd3_transformer(str(path), SD3, mx.float32)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_flux_key_bias_is_the_one_tensor_that_diffusionkit_has_no_place_for(flux: tuple[MMDiT, Path]) -> None:
    names = dict(tree_flatten(flux[0].parameters()))
    assert not any(part in name for name in names for part in FLUX_UNUSED)


def test_vae_decoder_reads_the_original_naming(folder: Path) -> None:
    config = VAEDecoderConfig()
    decoder = VAEDecoder(config.in_channels, config.out_channels, list(config.block_out_channels))
    weights = random_weights(decoder)
    original = {}
    for name, w in weights.items():
        name = name.replace("up_blocks", "up").replace("resnets", "block").replace("conv_shortcut", "nin_shortcut")
        name = name.replace(".upsample.", ".upsample.conv.").replace("conv_norm_out", "norm_out")
        for ours, theirs in (("0", "block_1"), ("1", "attn_1"), ("2", "block_2")):
            name = name.replace(f"mid_blocks.{ours}", f"mid.{theirs}")
        name = name.replace("group_norm", "norm")
        for ours, theirs in (("query_proj", "q"), ("key_proj", "k"), ("value_proj", "v"), ("out_proj", "proj_out")):
            name = name.replace(ours, theirs)
        if w.ndim == 4:
            w = w.transpose(0, 3, 1, 2)
        elif w.ndim == 2:
            w = w[:, :, None, None]
        original[f"first_stage_model.decoder.{name}"] = w
    path = folder / "vae.safetensors"
    mx.save_safetensors(str(path), original)
    loaded = load_vae_decoder(str(path), "first_stage_model.decoder.", mx.float32)
    decoder.load_weights(list(weights.items()))
    assert weights_fingerprint(loaded) == weights_fingerprint(decoder)


def tiny_tokenizer() -> Tokenizer:
    letters = [chr(c) for c in range(97, 123)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return Tokenizer({}, {token: i for i, token in enumerate(tokens)}, pad_with_eos=True)


def tiny_clip(width: int) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextModelConfig(num_layers=2, model_dims=width, num_heads=2, vocab_size=54))


@pytest.mark.parametrize(("cfg_weight", "rows"), [(0.0, 1), (0.5, 2), (1.0, 2), (5.0, 2)])
def test_sd3_text_has_one_row_without_guidance_and_two_with_it(cfg_weight: float, rows: int) -> None:
    pipeline = DiffusionPipeline.__new__(DiffusionPipeline)
    pipeline.use_t5 = False
    pipeline.clip_l, pipeline.clip_g = tiny_clip(64), tiny_clip(128)
    pipeline.tokenizer_l, pipeline.tokenizer_g = tiny_tokenizer(), tiny_tokenizer()
    text = text_encoder(pipeline, guidance=True)("fox", cfg_weight)
    assert text.tokens.shape == (rows, 154, 4096) and text.pooled.shape == (rows, 192)
    unconditional = text_encoder(pipeline, guidance=True)("", 5.0)
    if rows == 2:
        assert mx.array_equal(text.tokens[1], unconditional.tokens[0])


def test_skeletons_know_the_layers_of_the_real_models_without_loading_them() -> None:
    repository = "argmaxinc/mlx-stable-diffusion-3-medium"
    layers = linear_layers(sd3_skeleton("sd3_medium", repository))
    assert len([name for name in layers if name.endswith("mlp.fc2")]) == 24 + 23
    layers = linear_layers(flux_skeleton("flux_schnell", "argmaxinc/mlx-FLUX.1-schnell"))
    assert len([name for name in layers if name.startswith("unified_block_") and name.endswith("adaln")]) == 38


def test_flux_refuses_guidance_and_unknown_repositories_before_loading() -> None:
    with pytest.raises(ConfigError, match=r"sampler\.cfg_weight=3"):
        flux_skeleton("flux_dev", "argmaxinc/mlx-FLUX.1-dev", cfg_weight=3.0)
    with pytest.raises(ConfigError, match=r"model\.repository=argmaxinc/mlx-FLUX\.1-deev.*Did you mean"):
        flux_skeleton("flux_dev", "argmaxinc/mlx-FLUX.1-deev")
    assert issubclass(FluxPipeline, DiffusionPipeline)
