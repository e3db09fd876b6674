"""Taps: canonical names, what shares an input, and a model that is the loaded one again afterwards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from calib.activations.taps import InputTap, TapKind, TapPoint, TapSelection, tap_points, tapped
from calib.dataset.sampling import initial_noise
from calib.models.architecture import Conditioning, names_in_order
from calib.models.mmdit.architecture import MMDiTArchitecture
from calib.models.mmdit.names import layer_name, module_path
from calib.models.model import DiffusionModel, weights_fingerprint

import mlx.core as mx
import numpy as np
import pytest
from helpers import check_config_error
from mlx import nn
from mlx.utils import tree_flatten
from tiny_models import tiny_transformer
from watching import keep


@dataclass(frozen=True)
class Network:
    """A transformer, and one forward of it, the same every time."""

    architecture: MMDiTArchitecture
    forward: Callable[[], np.ndarray]

    def points(self, kind: TapKind = TapKind.LINEAR) -> list[TapPoint]:
        return tap_points(self.architecture, TapSelection(kind))

    def identities(self) -> dict[str, int]:
        """Every module and every weight, by object identity."""
        module = self.architecture.module
        modules = {f"module {name}": id(child) for name, child in module.named_modules()}
        return modules | {f"weight {name}": id(weight) for name, weight in tree_flatten(module.parameters())}

    def inputs(self) -> dict[str, np.ndarray]:
        """What each linear layer reads, each with a wrapper of its own."""
        seen: dict[str, mx.array] = {}
        apart = [TapPoint(name, "any") for name in self.architecture.layers()]
        with tapped(self.architecture, apart, keep(seen)):
            self.forward()
        return {name: np.array(x) for name, x in seen.items()}


def network_of(architecture: Any, x: mx.array, text: Conditioning) -> Network:
    timestep = mx.array(500.0)
    mx.eval(timestep)
    return Network(architecture, lambda: np.array(architecture.velocity(x, text, timestep)))


@pytest.fixture(scope="module")
def emoji(model: DiffusionModel) -> Network:
    """Two images with guidance."""
    noise = mx.stack([initial_noise(seed, model.latent_shape) for seed in (0, 1)])
    return network_of(model.architecture, mx.concatenate([noise] * 2), model.encode(["red apple", "octopus"], 3.0))


@pytest.fixture(scope="module")
def flux() -> Network:
    """Two rows; latents that are not square."""
    random = np.random.RandomState(0)
    x, tokens, pooled = (
        mx.array(random.randn(*shape).astype(np.float32)) for shape in ((2, 8, 6, 16), (2, 5, 48), (2, 32))
    )
    transformer = tiny_transformer("flux", text=48, pooled=32)
    return network_of(MMDiTArchitecture(transformer), x, Conditioning(tokens, pooled))


@pytest.fixture(params=["emoji", "flux"])
def network(request: pytest.FixtureRequest, emoji: Network, flux: Network) -> Network:
    return emoji if request.param == "emoji" else flux


# Names


def test_names_lead_to_modules_and_back(network: Network) -> None:
    architecture = network.architecture
    paths = dict(architecture.module.named_modules())
    linear = {path for path, module in paths.items() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert len(linear) > 45
    assert {module_path(layer_name(path)) for path in linear} == linear
    layers = architecture.layers()
    assert sorted(layers) == sorted(layer_name(path) for path in linear)
    assert all(module is paths[architecture.path(name)] for name, module in layers.items())
    for block in architecture.blocks():
        assert layer_name(architecture.path(block)) == block
        assert "Block" in type(paths[architecture.path(block)]).__name__


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
def test_names_as_designed(name: str, path: str) -> None:
    assert layer_name(path) == name
    assert module_path(name) == path


def test_layers_in_network_order(emoji: Network, flux: Network) -> None:
    names = list(emoji.architecture.layers())
    assert names[-1].startswith("final_layer")
    assert all("block" not in name for name in names[:6])
    ends = ["adaln", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.fc1", "mlp.fc2"]
    assert [n for n in names if n.startswith("mm_block_0.image")] == [f"mm_block_0.image.{end}" for end in ends]
    blocks = [int(name.split(".")[0].removeprefix("mm_block_")) for name in names if name.startswith("mm_block")]
    assert blocks == sorted(blocks)
    flux_names = list(flux.architecture.layers())
    assert flux_names.index("mm_block_1.text.mlp.fc2") < flux_names.index("unified_block_0.attn.q_proj")
    assert flux_names.index("unified_block_1.mlp.fc2") < flux_names.index("final_layer.linear")


def test_blocks_precede_their_layers(network: Network) -> None:
    layers, blocks = list(network.architecture.layers()), network.architecture.blocks()
    order = names_in_order(network.architecture)
    assert [name for name in order if name not in blocks] == layers
    assert [name for name in order if name in blocks] == blocks
    for block in blocks:
        assert order.index(block) + 1 == min(order.index(name) for name in layers if name.startswith(f"{block}."))


def test_blocks_are_numbered_through(network: Network) -> None:
    """What comes after the blocks counts as one more, what comes before them as none."""
    architecture = network.architecture
    blocks = architecture.blocks()
    assert len(blocks) == sum(architecture.depth)
    assert [architecture.block_of(block) for block in blocks] == list(range(len(blocks)))
    for name in architecture.layers():
        head = name.split(".")[0]
        expected = blocks.index(head) if head in blocks else len(blocks) if head == "final_layer" else None
        assert architecture.block_of(name) == expected, name


def test_kinds(emoji: Network) -> None:
    kinds = {name: point.kind for point in emoji.points(TapKind.ALL) for name in point.names}
    assert kinds["mm_block_1.text.attn.k_proj"] == "modulated"
    assert kinds["mm_block_1.text.attn.o_proj"] == "post-attention"
    assert kinds["mm_block_1.image.mlp.fc2"] == "post-gelu"
    assert kinds["mm_block_1.image.adaln"] == "post-silu"
    assert kinds["t_embedder.2"] == "post-silu"
    assert kinds["x_embedder"] == "embedding"
    assert kinds["mm_block_1"] == "block"


# What shares an input


def test_every_layer_has_one_tap(network: Network) -> None:
    points = network.points()
    names = [name for point in points for name in point.names]
    assert sorted(names) == sorted(network.architecture.layers())
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


def test_shared_taps_read_equal_arrays(network: Network) -> None:
    seen = network.inputs()
    assert set(seen) == set(network.architecture.layers())
    shared = [(point.name, alias) for point in network.points() for alias in point.aliases]
    assert len(shared) >= 17, "k and v of every stream, and all adaLN layers but the first"
    for name, alias in shared:
        assert np.array_equal(seen[alias], seen[name]), alias
    assert not np.array_equal(seen["mm_block_0.image.attn.q_proj"], seen["mm_block_0.image.mlp.fc1"])


def test_serial_mlps_have_their_own_tap() -> None:
    points = tap_points(MMDiTArchitecture(tiny_transformer("serial")), TapSelection())
    assert "unified_block_0.mlp.fc1" in [point.name for point in points]


def test_inputs_explain_outputs(emoji: Network) -> None:
    """The tap of fc2 sees GELU(fc1(the tap of fc1)): taps are where they say they are."""
    seen = emoji.inputs()
    mlp = emoji.architecture.module.multimodal_transformer_blocks[1].image_transformer_block.mlp
    expected = nn.gelu(mlp.fc1(mx.array(seen["mm_block_1.image.mlp.fc1"])))
    np.testing.assert_allclose(seen["mm_block_1.image.mlp.fc2"], np.array(expected), atol=1e-4)


# In the network


@pytest.mark.parametrize("kind", list(TapKind))
def test_tapped_output_is_bit_identical(network: Network, kind: TapKind) -> None:
    parameters = dict(tree_flatten(network.architecture.module.parameters()))
    plain, seen = network.forward(), dict[str, mx.array]()
    before = {path: np.array(value) for path, value in parameters.items() if path.endswith("mlp.fc2.bias")}
    with tapped(network.architecture, network.points(kind), keep(seen)):
        observed = network.forward()
    assert np.array_equal(plain, observed)
    assert np.array_equal(plain, network.forward())
    assert len(seen) > 5
    if kind is not TapKind.LINEAR:
        assert {"mm_block_1.image", "mm_block_1.text"} <= set(seen)
        assert ("unified_block_1" in seen) == (network.architecture.depth[1] > 0)
    after = dict(tree_flatten(network.architecture.module.parameters()))
    assert all(np.array_equal(np.array(after[path]), value) for path, value in before.items()), "FLUX sets these"


def test_block_taps_see_each_stream(emoji: Network) -> None:
    seen: dict[str, mx.array] = {}
    points = emoji.points(TapKind.BLOCK)
    assert [point.name for point in points] == ["mm_block_0", "mm_block_1", "mm_block_2", "mm_block_3"]
    with tapped(emoji.architecture, points, keep(seen)):
        emoji.forward()
    streams = [f"mm_block_{i}.{stream}" for i in range(4) for stream in ("image", "text")]
    assert list(seen) == streams[:-1], "the last block has no text stream"
    assert seen["mm_block_0.image"].shape == (4, 64, 1, 256)
    assert seen["mm_block_0.text"].shape == (4, 16, 1, 256)


@pytest.mark.parametrize(
    ("kind", "include", "taps"),
    [(TapKind.LINEAR, ["mm_block_1.image.mlp.fc2"], 1), (TapKind.BLOCK, ["mm_block_1", "mm_block_3"], 3)],
)
def test_recorders_returns_are_read(emoji: Network, kind: TapKind, include: Sequence[str], taps: int) -> None:
    """It may have tied the activation to other work: so the very array that it gives back must be passed on."""
    plain, points = emoji.forward(), tap_points(emoji.architecture, TapSelection(kind, include=include))
    with tapped(emoji.architecture, points, lambda _, x: mx.zeros_like(x)):
        assert not np.array_equal(plain, emoji.forward())
    seen: dict[str, mx.array] = {}

    def tied(name: str, x: mx.array) -> mx.array:
        seen[name] = mx.max(x)
        after: mx.array = mx.depends([x], [seen[name]])[0]
        return after

    with tapped(emoji.architecture, points, tied):
        assert np.array_equal(plain, emoji.forward())
    assert len(seen) == taps


class Boom(Exception):
    pass


@pytest.mark.parametrize("kind", list(TapKind))
@pytest.mark.parametrize("error", [None, Boom, KeyboardInterrupt])
def test_the_model_is_given_back(network: Network, kind: TapKind, error: type[BaseException] | None) -> None:
    """However the context ends: the very modules and weights, and no modulations kept."""
    module = network.architecture.module
    before, fingerprint = network.identities(), weights_fingerprint(module)
    calls = 0

    def record(name: str, x: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        if error is not None and calls == 5:
            raise error
        return x

    if error is None:
        with tapped(network.architecture, network.points(kind), record):
            network.forward()
    else:
        with pytest.raises(error), tapped(network.architecture, network.points(kind), record):
            network.forward()
        assert calls == 5, "thrown inside the forward"
    after = network.identities()
    if network.architecture.depth[1]:  # a forward of FLUX sets these biases anew
        before, after = ({k: v for k, v in ids.items() if not k.endswith("fc2.bias")} for ids in (before, after))
    assert after == before
    assert weights_fingerprint(module) == fingerprint
    assert not any("_modulation_params" in child for _, child in module.named_modules())
    assert not any(isinstance(child, InputTap) for child in module.modules())


def test_the_model_is_given_back_from_a_misfit(emoji: Network) -> None:
    before = emoji.identities()
    points = [*emoji.points(), TapPoint("mm_block_9.image.attn.q_proj", "modulated")]
    with pytest.raises(IndexError), tapped(emoji.architecture, points, lambda _, x: x):
        pass
    assert emoji.identities() == before


# Choosing


def names_of(network: Network, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), **kind: Any) -> list[str]:
    points = tap_points(network.architecture, TapSelection(include=include, exclude=exclude, **kind))
    return [name for point in points for name in point.names]


def test_patterns_choose_layers(emoji: Network) -> None:
    assert names_of(emoji, ["x_embedder"]) == ["x_embedder"]
    assert names_of(emoji, ["*.mlp.fc2"], ["*.text.*"]) == [f"mm_block_{i}.image.mlp.fc2" for i in range(4)]
    others = {name for name in emoji.architecture.layers() if not name.endswith("adaln")}
    assert set(names_of(emoji, exclude=["*.adaln"])) == others
    assert names_of(emoji, ["mm_block_[12]"], kind=TapKind.BLOCK) == ["mm_block_1", "mm_block_2"]


def test_chosen_aliases(emoji: Network) -> None:
    points = tap_points(emoji.architecture, TapSelection(include=["*_2.image.attn.v_proj", "final_layer.adaln"]))
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
def test_a_pattern_that_fits_nothing(emoji: Network, selection: TapSelection, words: Sequence[str]) -> None:
    check_config_error(lambda: tap_points(emoji.architecture, selection), words)
