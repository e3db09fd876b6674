"""Taps: canonical names, what shares an input, and a model that is the loaded one again afterwards."""

from collections.abc import Iterator, Sequence
from typing import Any

from calib.activations.taps import (
    InputTap,
    TapKind,
    TapPoint,
    TapSelection,
    block_names,
    linear_layers,
    tap_points,
    tapped,
)
from calib.base.errors import ConfigError
from calib.dataset.sampling import initial_noise
from calib.models.mmdit.names import layer_name, module_path
from calib.models.model import DiffusionModel, weights_fingerprint

import mlx.core as mx
import numpy as np
import pytest
from diffusionkit.mlx.mmdit import MMDiT
from mlx import nn
from mlx.utils import tree_flatten
from tiny_flux import flux_config
from watching import keep


@pytest.fixture(scope="module")
def flux() -> MMDiT:
    """FLUX's structure, small: two double blocks, three unified ones with a parallel MLP, rotary positions."""
    transformer = MMDiT(flux_config(unified=3, text=48, pooled=32))
    mx.eval(transformer.parameters())
    return transformer


@pytest.fixture
def forward(model: DiffusionModel) -> Iterator[Any]:
    """One denoising call on two images with guidance, the same every time."""
    text = model.encode(["red apple", "octopus"], 3.0)
    x = mx.stack([initial_noise(seed, model.latent_shape) for seed in (0, 1)])

    def call() -> np.ndarray:
        output = model.denoise(x, mx.array(500.0), mx.array(0.5), text, 3.0)
        mx.eval(output)
        return np.array(output)

    yield call


def identities(transformer: MMDiT) -> dict[str, int]:
    """Every module and every weight, by object identity."""
    modules = {f"module {name}": id(module) for name, module in transformer.named_modules()}
    return modules | {f"weight {name}": id(weight) for name, weight in tree_flatten(transformer.parameters())}


def test_every_linear_layer_and_block_has_a_canonical_name_that_leads_back(model: DiffusionModel, flux: MMDiT) -> None:
    for transformer in (model.transformer, flux):
        paths = {path: module for path, module in transformer.named_modules()}
        linear = {path for path, module in paths.items() if isinstance(module, nn.Linear | nn.Conv2d)}
        assert len(linear) > 50
        assert {module_path(layer_name(path)) for path in linear} == linear
        names = [layer_name(path) for path in linear]
        assert len(set(names)) == len(linear)
        assert set(linear_layers(transformer)) == set(names)
        for name, module in linear_layers(transformer).items():
            assert module is paths[module_path(name)], name
        for name in block_names(transformer):
            assert layer_name(module_path(name)) == name
            assert "Block" in type(paths[module_path(name)]).__name__


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("mm_block_0.image.attn.q_proj", "multimodal_transformer_blocks.0.image_transformer_block.attn.q_proj"),
        ("mm_block_12.text.mlp.fc2", "multimodal_transformer_blocks.12.text_transformer_block.mlp.fc2"),
        ("mm_block_0.image.adaln", "multimodal_transformer_blocks.0.image_transformer_block.adaLN_modulation.layers.1"),
        ("mm_block_0.image", "multimodal_transformer_blocks.0.image_transformer_block"),
        ("mm_block_3", "multimodal_transformer_blocks.3"),
        ("unified_block_5.mlp.fc1", "unified_transformer_blocks.5.transformer_block.mlp.fc1"),
        ("unified_block_5.adaln", "unified_transformer_blocks.5.transformer_block.adaLN_modulation.layers.1"),
        ("unified_block_37", "unified_transformer_blocks.37"),
        ("x_embedder", "x_embedder.proj"),
        ("y_embedder.0", "y_embedder.mlp.layers.0"),
        ("t_embedder.2", "t_embedder.mlp.layers.2"),
        ("guidance_in.0", "guidance_in.mlp.layers.0"),
        ("context_embedder", "context_embedder"),
        ("final_layer.linear", "final_layer.linear"),
        ("final_layer.adaln", "final_layer.adaLN_modulation.layers.1"),
    ],
)
def test_names_are_those_of_the_design(name: str, path: str) -> None:
    assert layer_name(path) == name
    assert module_path(name) == path


def test_layers_are_listed_in_the_order_of_the_network(model: DiffusionModel, flux: MMDiT) -> None:
    names = list(model.architecture.layers())
    assert names[-1].startswith("final_layer")
    assert all("block" not in name for name in names[:6])
    first = [name for name in names if name.startswith("mm_block_0.image")]
    ends = ["adaln", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.fc1", "mlp.fc2"]
    assert first == [f"mm_block_0.image.{end}" for end in ends]
    blocks = [int(name.split(".")[0].removeprefix("mm_block_")) for name in names if name.startswith("mm_block")]
    assert blocks == sorted(blocks)
    flux_names = list(linear_layers(flux))
    assert flux_names.index("mm_block_1.text.mlp.fc2") < flux_names.index("unified_block_0.attn.q_proj")
    assert flux_names.index("unified_block_2.mlp.fc2") < flux_names.index("final_layer.linear")


def test_each_layer_belongs_to_exactly_one_tap(model: DiffusionModel, flux: MMDiT) -> None:
    for transformer in (model.transformer, flux):
        points = tap_points(transformer, TapSelection())
        names = [name for point in points for name in point.names]
        assert sorted(names) == sorted(linear_layers(transformer))
        by_name = {name: point.name for point in points for name in point.names}
        for name in names:
            if name.endswith((".k_proj", ".v_proj")):
                assert by_name[name] == name[: -len("k_proj")] + "q_proj"
            if name.endswith("adaln"):
                assert by_name[name] == "mm_block_0.image.adaln"
            if name.startswith("unified_block") and name.endswith("fc1"):
                assert by_name[name] == name.removesuffix("mlp.fc1") + "attn.q_proj"
            if name.startswith("mm_block") and name.endswith("fc1"):
                assert by_name[name] == name


def every_input(transformer: MMDiT, call: Any) -> dict[str, np.ndarray]:
    """What each linear layer reads in one forward, each with a wrapper of its own."""
    seen: dict[str, mx.array] = {}
    apart = [TapPoint(name, "any") for name in linear_layers(transformer)]
    with tapped(transformer, apart, keep(seen)):
        call()
    return {name: np.array(x) for name, x in seen.items()}


def test_layers_that_share_a_tap_really_read_equal_arrays(model: DiffusionModel, forward: Any) -> None:
    seen = every_input(model.transformer, forward)
    assert set(seen) == set(model.architecture.layers())
    shared = 0
    for point in tap_points(model.architecture, TapSelection()):
        for alias in point.aliases:
            assert np.array_equal(seen[alias], seen[point.name]), alias
            shared += 1
    assert shared == 24, "k and v of eight streams, and all adaLN layers but the first"
    assert not np.array_equal(seen["mm_block_0.image.attn.q_proj"], seen["mm_block_0.image.mlp.fc1"])


def test_layers_that_share_a_tap_in_flux_really_read_equal_arrays(flux: MMDiT) -> None:
    seen = every_input(flux, lambda: flux_forward(flux))
    assert set(seen) == set(linear_layers(flux))
    for point in tap_points(flux, TapSelection()):
        for alias in point.aliases:
            assert np.array_equal(seen[alias], seen[point.name]), alias


def flux_forward(transformer: MMDiT) -> np.ndarray:
    from helpers import velocity

    random = np.random.RandomState(0)
    x, tokens, pooled = (mx.array(random.randn(*shape).astype(np.float32)) for shape in FLUX_SHAPES)
    output = velocity(transformer, x, tokens, pooled, mx.array(250.0))
    mx.eval(output)
    return np.array(output)


FLUX_SHAPES = ((2, 8, 6, 16), (2, 5, 48), (2, 32))


def test_the_input_of_a_layer_explains_its_output(model: DiffusionModel, forward: Any) -> None:
    """The tap of fc2 sees GELU(fc1(the tap of fc1)): taps are where they say they are."""
    seen = every_input(model.transformer, forward)
    mlp = model.transformer.multimodal_transformer_blocks[1].image_transformer_block.mlp
    expected = nn.gelu(mlp.fc1(mx.array(seen["mm_block_1.image.mlp.fc1"])))
    np.testing.assert_allclose(seen["mm_block_1.image.mlp.fc2"], np.array(expected), atol=1e-4)


@pytest.mark.parametrize("kind", list(TapKind))
def test_a_tapped_model_gives_bit_identical_output(model: DiffusionModel, forward: Any, kind: TapKind) -> None:
    plain, seen = forward(), {}
    with tapped(model.architecture, tap_points(model.architecture, TapSelection(kind)), keep(seen)):
        observed = forward()
    assert np.array_equal(plain, observed)
    assert len(seen) > 6
    assert np.array_equal(plain, forward())


@pytest.mark.parametrize("kind", list(TapKind))
def test_a_tapped_flux_gives_bit_identical_output(flux: MMDiT, kind: TapKind) -> None:
    plain, seen = flux_forward(flux), {}
    biases = [np.array(block.transformer_block.mlp.fc2.bias) for block in flux.unified_transformer_blocks]
    with tapped(flux, tap_points(flux, TapSelection(kind)), keep(seen)):
        observed = flux_forward(flux)
    assert np.array_equal(plain, observed)
    if kind is not TapKind.LINEAR:
        assert {"mm_block_1.image", "mm_block_1.text", "unified_block_2"} <= set(seen)
    after = [np.array(block.transformer_block.mlp.fc2.bias) for block in flux.unified_transformer_blocks]
    assert all(np.array_equal(one, two) for one, two in zip(biases, after, strict=True))


def test_block_taps_see_the_blocks_outputs_stream_by_stream(model: DiffusionModel, forward: Any) -> None:
    seen: dict[str, mx.array] = {}
    points = tap_points(model.architecture, TapSelection(TapKind.BLOCK))
    assert [point.name for point in points] == ["mm_block_0", "mm_block_1", "mm_block_2", "mm_block_3"]
    with tapped(model.architecture, points, keep(seen)):
        forward()
    streams = [f"mm_block_{i}.{stream}" for i in range(4) for stream in ("image", "text")]
    assert list(seen) == streams[:-1], "the last block has no text stream"
    assert seen["mm_block_0.image"].shape == (4, 64, 1, 256)
    assert seen["mm_block_0.text"].shape == (4, 16, 1, 256)


def test_the_layer_reads_what_the_recorder_returns(model: DiffusionModel, forward: Any) -> None:
    """It may have tied the activation to other work: so the very array that it gives back must be passed on."""
    plain, blocks = forward(), ["mm_block_1", "mm_block_3"]
    for kind, include in ((TapKind.LINEAR, ["mm_block_1.image.mlp.fc2"]), (TapKind.BLOCK, blocks)):
        points = tap_points(model.architecture, TapSelection(kind, include=include))
        with tapped(model.architecture, points, lambda name, x: mx.zeros_like(x)):
            assert not np.array_equal(plain, forward())
        seen: dict[str, mx.array] = {}

        def tied(name: str, x: mx.array, seen: dict[str, mx.array] = seen) -> mx.array:
            seen[name] = mx.max(x)
            after: mx.array = mx.depends([x], [seen[name]])[0]
            return after

        with tapped(model.architecture, points, tied):
            assert np.array_equal(plain, forward())
        assert len(seen) == (1 if kind is TapKind.LINEAR else 3)


class Boom(Exception):
    pass


@pytest.mark.parametrize("kind", list(TapKind))
@pytest.mark.parametrize("error", [None, Boom, KeyboardInterrupt])
def test_the_model_is_the_loaded_one_again_however_the_context_ends(
    model: DiffusionModel, forward: Any, kind: TapKind, error: type[BaseException] | None
) -> None:
    before, fingerprint = identities(model.transformer), weights_fingerprint(model.transformer)
    calls = 0

    def record(name: str, x: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        if error is not None and calls == 5:
            raise error
        return x

    points = tap_points(model.architecture, TapSelection(kind))
    if error is None:
        with tapped(model.architecture, points, record):
            forward()
    else:
        with pytest.raises(error), tapped(model.architecture, points, record):
            forward()
        assert calls == 5, "thrown inside the forward"
    assert identities(model.transformer) == before
    assert weights_fingerprint(model.transformer) == fingerprint
    assert not any("_modulation_params" in module for _, module in model.transformer.named_modules())
    assert not any(isinstance(module, InputTap) for module in model.transformer.modules())


def test_the_model_is_restored_when_a_tap_cannot_be_placed(model: DiffusionModel) -> None:
    before = identities(model.transformer)
    points = [*tap_points(model.architecture, TapSelection()), TapPoint("mm_block_9.image.attn.q_proj", "modulated")]
    with pytest.raises(IndexError), tapped(model.architecture, points, lambda name, x: x):
        pass
    assert identities(model.transformer) == before


def names_of(
    transformer: MMDiT, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), **kind: Any
) -> list[str]:
    points = tap_points(transformer, TapSelection(include=include, exclude=exclude, **kind))
    return [name for point in points for name in point.names]


def test_patterns_choose_layers(model: DiffusionModel) -> None:
    transformer = model.transformer
    assert names_of(transformer, ["x_embedder"]) == ["x_embedder"]
    fc2 = names_of(transformer, ["*.mlp.fc2"], ["*.text.*"])
    assert fc2 == [f"mm_block_{i}.image.mlp.fc2" for i in range(4)]
    assert set(names_of(transformer, exclude=["*.adaln"])) == {
        name for name in linear_layers(transformer) if not name.endswith("adaln")
    }
    assert names_of(transformer, ["mm_block_[12]"], kind=TapKind.BLOCK) == ["mm_block_1", "mm_block_2"]


def test_a_chosen_alias_is_tapped_without_the_layer_it_shares_with(model: DiffusionModel) -> None:
    points = tap_points(model.architecture, TapSelection(include=["*_2.image.attn.v_proj", "final_layer.adaln"]))
    assert sorted((point.name, point.aliases, point.kind) for point in points) == [
        ("final_layer.adaln", (), "post-silu"),
        ("mm_block_2.image.attn.v_proj", (), "modulated"),
    ]


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        (
            TapSelection(include=["mm_block_0.image.atn.q_proj"]),
            ("taps.include=mm_block_0.image.atn.q_proj", "q_proj'"),
        ),
        (TapSelection(exclude=["*.mlp.fc3"]), ("taps.exclude=*.mlp.fc3", "'*.mlp.fc2'")),
        (TapSelection(include=["mm_block_0.image.mlp.fc2", "x_embeder"]), ("taps.include=x_embeder", "'x_embedder'")),
        (TapSelection(TapKind.BLOCK, include=["mm_block_4"]), ("taps.include=mm_block_4", "'mm_block_")),
        (TapSelection(TapKind.BLOCK, include=["*.fc2"]), ("taps.include=*.fc2", "matches no layer", "mm_block_0")),
        (TapSelection(exclude=["*"]), ("taps.exclude", "no layer")),
    ],
)
def test_a_pattern_that_fits_nothing_is_an_error_with_near_misses(
    model: DiffusionModel, selection: TapSelection, words: Sequence[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        tap_points(model.architecture, selection)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_what_each_layer_reads_is_named(model: DiffusionModel) -> None:
    kinds = {
        name: point.kind for point in tap_points(model.architecture, TapSelection(TapKind.ALL)) for name in point.names
    }
    assert kinds["mm_block_1.text.attn.k_proj"] == "modulated"
    assert kinds["mm_block_1.text.attn.o_proj"] == "post-attention"
    assert kinds["mm_block_1.image.mlp.fc2"] == "post-gelu"
    assert kinds["mm_block_1.image.adaln"] == "post-silu"
    assert kinds["t_embedder.2"] == "post-silu"
    assert kinds["x_embedder"] == "embedding"
    assert kinds["mm_block_1"] == "block"
