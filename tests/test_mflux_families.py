"""Every family of mflux's: drawn as mflux draws it, and tapped without a trace."""

import importlib
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("mflux", reason="mflux is not installed: uv sync --group mflux")

from calib.activations.taps import TapKind, TapPoint, TapSelection, tap_points, tapped
from calib.base.device import on_gpu
from calib.base.errors import CalibError, ConfigError
from calib.base.files import read_json
from calib.dataset.generate import trajectory, trajectory_from
from calib.dataset.load import load_manifest
from calib.dataset.settings import SamplerSettings
from calib.dataset.store import read_state
from calib.evaluation.paired import rounded_to_bfloat16
from calib.models.architecture import Conditioning, check_architecture
from calib.models.families import MFLUX as MODULES
from calib.models.mflux import decoder
from calib.models.model import DiffusionModel, ModelDtype, weights

import mlx.core as mx
import model_memory
import numpy as np
from drawn_by_mflux import Mfluxs
from helpers import CHECKOUT, is_one_clear_line, run_in, well
from mflux.models.common.weights.saving.model_saver import ModelSaver
from mlx import nn
from PIL import Image
from tiny_mflux import Tiny
from tiny_models import EACH_OF_MFLUX, MFLUX, tiny_of
from watching import keep

#: Texts of 1, 2 and 5 times 32 tokens, once padded.
TEXTS = ("red apple", "a lighthouse on a rocky coast at dusk, painted in oil", "one fox, two foxes, " * 12)
#: Layers of each family at full size, and the names of three.
FULL = {
    "zimage": (276, ("noise_refiner_1.adaln", "unified_block_29.mlp.w2", "final_layer.adaln")),
    "qwen": (846, ("mm_block_59.text.adaln", "mm_block_59.image.attn.o_proj", "t_embedder.2")),
    "flux1_dev": (504, ("mm_block_18.image.attn.o_proj", "unified_block_37.attn.o_mlp_proj", "guidance_in.2")),
    "flux1_schnell": (502, ("mm_block_18.text.adaln", "unified_block_37.mlp.fc1", "y_embedder.0")),
    "flux2": (109, ("mm_block_4.text.attn.o_proj", "unified_block_19.attn.qkv_mlp_proj", "modulation.unified")),
}


@dataclass
class Own:
    """A family's small model: its files by type, and what mflux has loaded of them."""

    tiny: Tiny
    folder: Path
    mfluxs_of: dict[ModelDtype, Mfluxs] = field(default_factory=dict)

    def files(self, dtype: ModelDtype = ModelDtype.FLOAT32) -> Path:
        folder = self.folder / dtype.value
        if not folder.exists():
            self.tiny.write(folder, dtype.mlx)
        return folder

    def loaded(
        self,
        size: tuple[int, int] = (64, 64),
        dtype: ModelDtype = ModelDtype.FLOAT32,
        stream: bool = False,
        **told: float,
    ) -> DiffusionModel:
        given = {"image_size": size, "stream": stream, **told}
        return self.tiny.family.load(self.tiny.option, "nowhere/nothing", str(self.files(dtype)), dtype, **given)

    def mfluxs(self, dtype: ModelDtype = ModelDtype.FLOAT32) -> Mfluxs:
        if dtype not in self.mfluxs_of:
            self.mfluxs_of[dtype] = Mfluxs(self.tiny, self.files(dtype), dtype.mlx)
        return self.mfluxs_of[dtype]

    @property
    def guided(self) -> bool:
        return self.tiny.family.guidance is not None

    def guidance(self, weight: float) -> tuple[float, dict[str, float], dict[str, float]]:
        """A weight of guidance as calib's sampler, as its transformer, and as mflux is given it, where it is."""
        told = {"guidance": weight} if self.tiny.told else {}
        return weight * self.guided, told, {"guidance": weight or 1.0} if self.guided else told


#: Of what costs the most by default those with and without guidance, and texts of different lengths.
TWO_OF_MFLUX = [s if s in ("zimage", "qwen") else pytest.param(s, marks=pytest.mark.slow) for s in MFLUX]


@pytest.fixture(scope="module", params=EACH_OF_MFLUX)
def own(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    tiny = tiny_of(request.param)
    with pytest.MonkeyPatch.context() as patch:
        tiny.patched(patch)
        yield Own(tiny, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(own: Own) -> DiffusionModel:
    return own.loaded()


def state_of(model: DiffusionModel, rows: int) -> mx.array:
    return mx.random.normal((rows, *model.latent_shape), key=mx.random.key(0))


@pytest.mark.parametrize(
    ("text", "seed", "steps", "size", "guidance"),
    [
        (TEXTS[2], 2**32 - 1, 2, (112, 80), 0.0),
        (" ", 3, 3, (64, 64), 3.5),
        pytest.param(TEXTS[0], 7, 4, (64, 64), 4.0, marks=pytest.mark.slow),
        pytest.param(TEXTS[1], 0, 5, (64, 128), 1.5, marks=pytest.mark.slow),
    ],
)
def test_latents_and_pictures_are_mfluxs(
    own: Own, text: str, seed: int, steps: int, size: tuple[int, int], guidance: float
) -> None:
    weight, told, given = own.guidance(guidance)
    drawing = own.loaded(size, **told)
    settings = SamplerSettings(num_steps=steps, cfg_weight=weight, image_size=size)
    states, decoded, picture = own.mfluxs().draw(text, seed, steps, size, **given)
    drawn = list(trajectory(drawing, [text if text.strip() else ""], [seed], settings))
    assert states.std() > 0.5 and len(drawn) == steps + 1
    np.testing.assert_allclose(np.stack([np.array(state.x[0]) for state in drawn]), states, atol=1e-5)
    for decode in (drawing.decode_latents, drawing.draw_latents or drawing.decode_latents):
        np.testing.assert_allclose(np.array(decode(drawn[-1].x))[0], decoded, atol=1e-5)
    pixels = np.array(drawing.decode(drawn[-1].x))[0] * 255
    assert np.abs(pixels - picture).max() < 0.502  # rounded to whole shades
    assert picture.std() > 10


def test_the_gradient_of_a_picture_is_that_of_mfluxs_decoder(own: Own, model: DiffusionModel) -> None:
    """Though it computes each block of the decoder once more, not to keep what is in it."""
    latents, taken = state_of(model, 1), []

    def along(pictures: mx.array) -> mx.array:
        return (pictures * mx.random.normal(pictures.shape, key=mx.random.key(1))).sum()

    kinds = {kind: vars(kind).get("__call__") for kind in map(type, model.decoder.modules())}
    found = []
    for again in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not again:
                patch.setattr(decoder, "_computed_again", lambda vae: nullcontext())
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            found.append(mx.grad(lambda z: along(model.decode_latents(z)))(latents))
            mx.eval(found[-1])
            taken.append(mx.get_peak_memory() - before)
    assert mx.array_equal(*found) and mx.abs(found[0]).max() > 0
    if own.tiny.option != "qwen_image":  # of which one convolution takes more than all that is kept
        assert taken[0] < taken[1]
    assert all(vars(kind).get("__call__") is call for kind, call in kinds.items())


@pytest.mark.parametrize("own", TWO_OF_MFLUX, indirect=True)
def test_16_bits_are_mfluxs(own: Own) -> None:
    """States, which mflux rounds at each step, too; of the picture it rounds the shades, which calib does not."""
    weight, told, given = own.guidance(3.5)
    states, _, picture = own.mfluxs(ModelDtype.BFLOAT16).draw(TEXTS[0], 7, 3, (64, 64), **given)
    drawing = own.loaded(dtype=ModelDtype.BFLOAT16, **told)
    settings = SamplerSettings(num_steps=3, cfg_weight=weight)
    drawn = list(trajectory(drawing, [TEXTS[0]], [7], settings))
    found = np.stack([np.array(state.x[0]) for state in drawn])
    np.testing.assert_allclose(found, states, atol=0.05 if on_gpu() else 1e-5)
    assert np.abs(np.array(drawing.decode(drawn[-1].x))[0] * 255 - picture).max() < (8 if on_gpu() else 2)
    with rounded_to_bfloat16(drawing):  # as controls are drawn: in float32, but at the same timesteps
        *_, control = trajectory(drawing, [TEXTS[0]], [7], settings)
    assert np.linalg.norm(np.array(control.x[0]) - found[-1]) < 0.02 * np.linalg.norm(found[-1])


@pytest.mark.parametrize("own", TWO_OF_MFLUX, indirect=True)
def test_a_batch_gives_what_each_gives_alone(own: Own, model: DiffusionModel) -> None:
    """Of texts of other lengths, beside one another, and with more room than they need."""
    weight, seeds = 2.0 * own.guided, [5, 6, 7]
    settings = SamplerSettings(num_steps=3, cfg_weight=weight)
    alone = [list(trajectory(model, [text], [seed], settings))[-1].x for text, seed in zip(TEXTS, seeds, strict=True)]
    text = model.encode(TEXTS, weight)
    assert (text.lengths is not None) == own.tiny.varying
    counts = tuple(map(model.token_count, TEXTS))
    assert len({*counts}) == 3 and (text.lengths is None or text.lengths[:3] == counts)
    assert max(counts) < model.max_prompt_tokens
    for given in (text, text.padded(300)) if own.tiny.varying else (text,):
        *_, together = trajectory_from(model, given, seeds, 3, weight)
        np.testing.assert_allclose(np.array(together.x), np.array(mx.concatenate(alone)), atol=1e-5)


def test_names_and_taps(own: Own, model: DiffusionModel) -> None:
    architecture, before = model.architecture, weights(model.transformer)
    check_architecture(architecture, own.tiny.option)
    layers = architecture.layers()
    assert len(layers) == sum(isinstance(m, nn.Linear) for m in model.transformer.modules())
    x, text, seen = state_of(model, 3), model.encode(TEXTS, 0), dict[str, mx.array]()
    plain = np.array(model.velocity(x, text, 0.25))
    with tapped(architecture, tap_points(architecture, TapSelection(TapKind.ALL)), keep(seen)):
        np.testing.assert_array_equal(np.array(model.velocity(x, text, 0.25)), plain)
    assert {array.shape[0] for array in seen.values()} == {3}
    for name, tap in ((n, architecture.shared_input(n)) for n in layers):
        assert seen[tap].shape[-1] == layers[name].weight.shape[1], name
    blocks = {f"{b}.{s}" if s else b for b in architecture.blocks() for s in architecture.streams(b) or ("",)}
    assert blocks <= seen.keys()
    after = weights(model.transformer)
    assert after.keys() == before.keys() and all(after[path] is before[path] for path in before)


def test_taps_in_a_batch_see_the_numbers_of_each_alone(own: Own, model: DiffusionModel) -> None:
    """Some of them more than once, where texts differ in length; so each channel's extremes are the same."""
    points, x = tap_points(model.architecture, TapSelection(TapKind.ALL)), state_of(model, 4)
    lengths = (5, 32, 90, 31) if own.tiny.varying else (32,) * 4  # with padding and without
    texts = [own.tiny.conditioning(n, seed) for seed, n in enumerate(lengths)]

    def seen(x: mx.array, text: Conditioning) -> dict[str, np.ndarray]:
        found: dict[str, mx.array] = {}
        with tapped(model.architecture, points, keep(found)):
            mx.eval(model.velocity(x, text, 0.25), found)
        return {n: np.array(x).reshape(len(x), -1, x.shape[-1]) for n, x in found.items()}

    together = seen(x, Conditioning.batch(texts))
    for row, text in enumerate(texts):
        for name, alone in seen(x[row : row + 1], text).items():
            for extreme in (np.min, np.max):
                found, expected = extreme(together[name][row], axis=0), extreme(alone[0], axis=0)
                np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)


def test_inputs_of_layers_that_share_a_tap_are_one_array(model: DiffusionModel) -> None:
    architecture, seen = model.architecture, dict[str, mx.array]()
    points = [TapPoint(name, "") for name in architecture.layers()]
    with tapped(architecture, points, keep(seen)):
        mx.eval(model.velocity(state_of(model, 1), model.encode(TEXTS[:1], 0), 0.5))
    for name in architecture.layers():
        assert mx.array_equal(seen[name], seen[architecture.shared_input(name)]).item(), name


def test_what_mflux_saved(own: Own, model: DiffusionModel, tmp_path: Path) -> None:
    """It has no sizes beside it, as a model of mflux's own sizes needs none."""
    ModelSaver.save_model(own.mfluxs().model, None, str(tmp_path), own.tiny.family.definition)
    for component in ("transformer", *(path.name for path in tmp_path.glob("text_encoder*"))):
        shutil.copy(own.files() / component / "config.json", tmp_path / component)
    found = own.tiny.family.load(own.tiny.option, "nowhere/nothing", str(tmp_path), ModelDtype.FLOAT32)
    assert found.fingerprint == model.fingerprint
    text, expected = found.encode(TEXTS[:1], 0), model.encode(TEXTS[:1], 0)
    assert mx.array_equal(text.tokens, expected.tokens).item() and text.lengths == expected.lengths


#: By option, another model and what is said of its folder.
UNFIT = r"transformer: .*required weights have no match"
OTHERS = {
    "zimage_turbo": ("qwen", UNFIT),
    "flux2_klein_4b": ("qwen", UNFIT),
    "qwen_image": ("flux2", UNFIT),
    "flux1_dev": ("flux1_schnell", r"transformer: lacks tensor 'time_text_embed\.guidance_embedder"),
    "flux1_schnell": ("flux1_dev", r"transformer: has an unknown tensor 'time_text_embed\.guidance_embedder"),
}


def test_a_folder_of_another_model_is_one_line(own: Own, tmp_path: Path) -> None:
    other, told = OTHERS[own.tiny.option]
    tiny_of(other).write(tmp_path, mx.float32)
    with pytest.raises(CalibError, match=told) as error:
        own.tiny.family.load(own.tiny.option, "nowhere/nothing", str(tmp_path), ModelDtype.FLOAT32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("structure", MFLUX)
def test_layers_at_full_size(structure: str) -> None:
    count, names = FULL[structure]
    tiny = tiny_of(structure)
    full = tiny.family.skeleton(tiny.option, "nobody/nothing")
    layers = full.layers()
    assert len(layers) == count and set(names) <= layers.keys()
    paths = [path for path, module in full.module.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(map(full.path, layers)) == sorted(paths)


@pytest.mark.parametrize("own", TWO_OF_MFLUX, indirect=True)
def test_streamed_from_its_files(own: Own) -> None:
    """The same latents from the same weights, of which none stays in memory."""
    settings, drawn = SamplerSettings(num_steps=2, cfg_weight=2.0 if own.guided else 0.0), []
    models = [own.loaded(dtype=ModelDtype.BFLOAT16, stream=stream) for stream in (False, True)]
    for drawing in models:
        drawn.append([np.array(state.x) for state in trajectory(drawing, TEXTS[:2], [7, 8], settings)])
    assert np.array_equal(*drawn)
    whole, streamed = models
    assert streamed.streamed is not None and whole.streamed is None
    assert streamed.fingerprint == whole.fingerprint
    assert {w.dtype for w in weights(streamed.transformer).values()} == {mx.bfloat16}


#: Z-Image's is in test_mflux.
JOBS = [pytest.param(structure, marks=pytest.mark.slow) for structure in MFLUX[1:]]


@pytest.mark.parametrize("own", JOBS, indirect=True)
def test_the_whole_job(own: Own, model: DiffusionModel, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    given = (
        *(f"model={own.tiny.option}", "model.dtype=float32", f"model.checkpoint={own.files()}", "hydra.run.dir=run"),
        *("prompts=file", "prompts.path=texts.txt", "num_images=3", "sampler.image_size=[64,64]"),
        *("sampler.num_steps=3", "sampler.batch_size=2", "data_dir=dataset", "dataset.dtype=float32"),
        *("timestep_schedule=all", "taps=all", "sensitivity.images=1", "sensitivity.group_sizes=[32]"),
        *("calibration.images=1", "calibration.steps=1", "evaluation.num_images=1", "evaluation.steps=1"),
        *("analysis.activation_bits=16", "evaluation.dequantize=false"),
    )
    well(run_in(tmp_path, *given))
    _check_export(own, tmp_path)
    plan, metrics = read_json(tmp_path / "run" / "quantization_config.json"), read_json(tmp_path / "run/metrics.json")
    layers = model.architecture.layers()
    assert set(plan) >= set(layers) and len({own["suggested_weight_bits"] for own in plan.values()}) > 1
    assert 0 < metrics["output_error"] < 1 and metrics["psnr"] < metrics["control_psnr"]
    assert "sound" in well(run_in(tmp_path, "verify", "dataset")).out
    manifest = load_manifest(tmp_path / "dataset")
    assert manifest.cfg_weight == (3.5 if own.guided else 0) and manifest.noise == model.flow.noise_kind
    manifest.noise = "numpy"
    manifest.save(tmp_path / "dataset")
    assert "state 0 is not the noise" in run_in(tmp_path, "verify", "dataset").out


def _check_export(own: Own, folder: Path) -> None:
    """mflux draws with the exported folder the 8-bit picture that the job evaluated.

    On a GPU, and with guidance, whose two rows calib computes at once, sums differ in order.
    """
    well(run_in(folder, "export", "run", "--format", "mflux", "--into", "out"))
    (evaluated,) = folder.glob("*-evaluation-*/manifest.json")
    image, *_ = read_json(evaluated)["images"]
    made = Mfluxs(own.tiny, folder / "out", mx.float32)
    *_, picture = made.draw(image["prompt"], image["seed"], 3, (64, 64), **own.guidance(3.5)[2])
    full, drawn = (
        np.array(Image.open(folder / "run" / "images" / which / "0000.png")).astype(int)
        for which in ("full", "quantized")
    )
    assert np.abs(picture - drawn).max() <= (2 if on_gpu() else own.guided)
    assert np.abs(full - drawn).max() > 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantizer",
    [
        ("learned", "updates=2", "num_steps=2", "held_out=1", "pictures=1", "batch_size=1"),
        ("gptq", "rotation=16", "pictures=1"),
        ("taqdit", "iterations=2"),
        ("percentile",),
    ],
    ids=lambda quantizer: quantizer[0],
)
def test_every_quantizer(quantizer: tuple[str, ...], own: Own, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS, "one more", "and another"]) + "\n")
    name, *more = quantizer
    given = (
        *(f"model={own.tiny.option}", "model.dtype=float32", f"model.checkpoint={own.files()}", "hydra.run.dir=run"),
        *("prompts=file", "prompts.path=texts.txt", "num_images=3", "sampler.image_size=[64,64]", "analysis=uniform"),
        *("sampler.num_steps=3", "timestep_schedule=all", "calibration.images=2", "analysis.weight_bits=4"),
        *("evaluation.num_images=1", "evaluation.steps=1", f"quantizer={name}", *(f"quantizer.{own}" for own in more)),
    )
    well(run_in(tmp_path, *given))
    assert 5 < read_json(tmp_path / "run" / "metrics.json")["psnr"] < 90


@pytest.mark.parametrize("own", ["flux1_dev"], indirect=True)
def test_guidance_that_the_transformer_is_told(own: Own, tmp_path: Path) -> None:
    """It makes other images: a dataset has those of one, and its name follows from it."""
    (tmp_path / "texts.txt").write_text("red apple\n")
    given = (
        *("model=flux1_dev", f"model.checkpoint={own.files()}", "model.dtype=float32", "sampler.image_size=[32,32]"),
        *("sampler.num_steps=1", "num_images=1", "prompts=file", "prompts.path=texts.txt"),
    )
    line = is_one_clear_line(run_in(tmp_path, "generate", *given, "model.guidance=-1"))
    assert line.startswith("model.guidance=-1")
    line = is_one_clear_line(run_in(tmp_path, "generate", *given, "sampler.cfg_weight=3"))
    assert line.startswith("sampler.cfg_weight=3.0: flux1_dev takes only 0, its guidance is distilled")
    for weight in (2, 3):
        well(run_in(tmp_path, "generate", *given, f"model.guidance={weight}"))
    first, second = sorted((tmp_path / "calibration_data").iterdir())
    assert not np.array_equal(*(read_state(each, load_manifest(each), 0, 1) for each in (first, second)))
    more = (f"data_dir={first}", "num_images=2", "model.guidance=7")
    line = is_one_clear_line(run_in(tmp_path, "generate", *given, *more), status=1)
    assert "text_encoders=clip_l+t5 at guidance" in line and "not clip_l+t5 at guidance 7" in line


@pytest.mark.parametrize("name", sorted({*MODULES} - {"flux1_dev"}))
def test_transformers_that_are_told_none(name: str) -> None:
    family = importlib.import_module(MODULES[name]).FAMILY
    with pytest.raises(ConfigError, match=r"^model\.guidance=2\.0: the transformer of x is told none; leave it out$"):
        family.skeleton("x", "nobody/nothing", guidance=2.0)


def test_the_table_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """It is the one on the page for mflux's users."""
    model_memory.main()
    table = capsys.readouterr().out
    assert table.count("GB") == 15 and table in (CHECKOUT / "docs" / "MFLUX.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("own", ["qwen"], indirect=True)
def test_steps_that_mfluxs_scheduler_cannot(own: Own, tmp_path: Path) -> None:
    """It stretches the levels so that the last is 0.02, which of one level is 0 / 0."""
    given = (f"model={own.tiny.option}", f"model.checkpoint={own.files()}", "sampler.image_size=[64,64]")
    line = is_one_clear_line(run_in(tmp_path, "generate", *given, "model.dtype=float32", "sampler.num_steps=1"))
    assert line.startswith("sampler.num_steps=1: qwen_image makes noise levels of it that are not finite")
