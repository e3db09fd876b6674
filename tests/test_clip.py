"""CLIP: its network against float64, the files of one that a user names, scores in runs and of folders."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from calib.base.errors import CalibError
from calib.base.files import read_json
from calib.base.graphs import watched
from calib.base.layout import DETAILS, FIDELITY, FULL_PICTURES, METRICS, PAGE, QUANTIZED_PICTURES
from calib.evaluation.agreement import score_lines
from calib.evaluation.categories import categories_of
from calib.evaluation.features.clip_features import ClipFeatures
from calib.evaluation.measures import Sources, choose
from calib.evaluation.metrics import Fidelity
from calib.stages.build import build
from calib.stages.evaluate import reference_sources

import mlx.core as mx
import numpy as np
import pytest
import tiny_clip
from helpers import Outcome, is_one_clear_line, run_here, run_in, well
from numpy.typing import NDArray
from PIL import Image
from test_config import composed
from tiny_clip import PLACES, SIZE, of_picture, of_tokens, vocabulary, weights

Calib: TypeAlias = Callable[..., Outcome]
Pixels: TypeAlias = NDArray[np.uint8]
TEXTS = ("red apple", "a", "", "fox, fox, fox", "one <|endoftext|> two")


def picture(seed: int, width: int = SIZE, height: int = SIZE) -> Pixels:
    coarse = np.random.RandomState(seed).randint(0, 256, (3, 3, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def features(folder: Path, cache: str = "cache") -> ClipFeatures:
    return ClipFeatures(str(folder), "clip", folder.parent / cache)


# The network


def tokens_of(text: str) -> list[int]:
    """Ids of a text of small letters and commas, cut off as CLIP does, up to its first end."""
    ids, _ = vocabulary()
    found = ["<|startoftext|>"]
    for word in text.replace(",", " ,").split():
        whole = word in ("red", "<|endoftext|>")
        found += [{"red": "red</w>"}.get(word, word)] if whole else [*word[:-1], f"{word[-1]}</w>"]
    cut = [*found[: PLACES - 1], "<|endoftext|>"]
    return [ids[token] for token in cut[: cut.index("<|endoftext|>") + 1]]


@pytest.mark.parametrize(("activation", "dtype"), [("quick_gelu", mx.float32), ("gelu", mx.float16)])
def test_features_are_those_of_the_towers_in_float64(tmp_path: Path, activation: str, dtype: mx.Dtype) -> None:
    """PyTorch's own are compared by scripts/check_clip.py, as it is not installed here."""
    own = features(tiny_clip.write(tmp_path / "clip", activation=activation, dtype=dtype))
    kept = {name: np.array(mx.array(w).astype(dtype).astype(mx.float32)) for name, w in weights().items()}
    shown = [picture(seed) for seed in range(5)]
    texts = np.stack([of_tokens(kept, tokens_of(text), activation) for text in TEXTS])
    pictures = np.stack([of_picture(kept, pixels, activation) for pixels in shown])
    for found, expected in ((own.texts(TEXTS), texts), (own.vectors(shown), pictures)):
        assert np.abs(found - expected).max() < 1e-5
        assert np.abs(expected[:, None] - expected).max(axis=2)[~np.eye(5, dtype=bool)].min() > 0.1, "all differ"
    cosines = np.sum(texts * pictures, axis=1)
    np.testing.assert_allclose(own.scores(shown, TEXTS), 100 * np.maximum(cosines, 0), atol=1e-3)
    assert cosines.min() < 0 < cosines.max() and own.truncated(TEXTS) == 1
    similar = own.similarities([(shown[0], shown[0]), (shown[0], shown[1])])
    assert similar[0] == 1 and similar[1] == pytest.approx(pictures[0] @ pictures[1], abs=1e-5)


def test_metal_has_kernels_for_it(tmp_path: Path) -> None:
    folder = tiny_clip.write(tmp_path / "clip", dtype=mx.float16)
    with watched() as graphs:
        features(folder).scores([picture(0)], ["red apple"])
    assert graphs.lacking == {}
    assert {"LayerNorm", "ScaledDotProductAttention"} <= {operation.name for operation in graphs.operations}


def test_pictures_of_other_sizes_are_resized_and_cropped(tmp_path: Path) -> None:
    """The shorter side to the network's size by Pillow's bicubic filter, then the middle."""
    own = features(tiny_clip.write(tmp_path / "clip"))
    for width, height in ((100, 60), (20, 50)):
        pixels, short = picture(1, width, height), min(width, height)
        resized = Image.fromarray(pixels).resize(
            (SIZE * width // short, SIZE * height // short), Image.Resampling.BICUBIC
        )
        left, top = ((side - SIZE) // 2 for side in resized.size)
        middle = np.asarray(resized)[top : top + SIZE, left : left + SIZE]
        np.testing.assert_allclose(own.vectors([pixels]), own.vectors([middle]), atol=1e-6)


def test_features_are_kept_by_content_of_pictures_texts_and_clip(tmp_path: Path) -> None:
    folder, shown = tiny_clip.write(tmp_path / "clip"), [picture(0), picture(1)]
    first = features(folder)
    expected = first.vectors(shown), first.texts(TEXTS)
    again = features(folder)
    again.__dict__["_network"] = None  # which is not needed
    found = again.vectors(shown[::-1])[::-1], again.texts(TEXTS)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    other = features(tiny_clip.write(tmp_path / "other", seed=1))
    assert np.abs(other.vectors(shown) - expected[0]).max() > 0.1 and other.content != first.content
    shutil.rmtree(folder)
    assert features(tiny_clip.write(folder)).content == first.content


# Files


def changed(file: str, **entries: object) -> Callable[[Path], object]:
    """Changes entries of a JSON file."""
    return lambda folder: (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | entries))


def of_text(**entries: object) -> Callable[[Path], object]:
    return lambda folder: changed("config.json", text_config=tiny_clip.config()["text_config"] | entries)(folder)


def of_pictures(**entries: object) -> Callable[[Path], object]:
    return lambda folder: changed("config.json", vision_config=tiny_clip.config()["vision_config"] | entries)(folder)


def removed(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).unlink()


def filled(file: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(text)


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def tensors(change: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], object]:
    def done(folder: Path) -> None:
        arrays = {name: mx.array(array) for name, array in weights().items()}
        change(arrays)
        mx.save_safetensors(str(folder / "model.safetensors"), arrays)

    return done


BAD: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder, nor a repository's name, OWNER/NAME; calib reads"),
    "an empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "has no config.json; calib reads what transformers'"),
    "SigLIP": (changed("config.json", model_type="siglip"), "is of model_type 'siglip', not 'clip'; calib reads"),
    "a list": (filled("config.json", "[]"), "is of model_type None, not 'clip'"),
    "no JSON": (filled("config.json", "{"), "config.json: not valid JSON"),
    "a word for a number": (of_text(hidden_size="wide"), "config.json: is no CLIP's ("),
    "another activation": (of_text(hidden_act="relu"), "hidden_act=relu; calib knows quick_gelu and gelu"),
    "heads": (of_pictures(num_attention_heads=3), "config.json: is no CLIP's ("),
    "patches": (of_pictures(patch_size=5), "image_size=32 is not a multiple of patch_size=5"),
    "grey pictures": (of_pictures(num_channels=1), "square pictures of three channels"),
    "no weights": (removed("model.safetensors"), "has no model.safetensors; from pytorch_model.bin it is made by"),
    "weights cut off": (cut_off, "model.safetensors: was cut, it has"),
    "weights of nothing": (filled("model.safetensors", ""), "model.safetensors: not a readable safetensors file"),
    "another width": (of_text(intermediate_size=48), "has shape (40, 24), not (48, 24)"),
    "more layers": (of_text(num_hidden_layers=3), "lacks tensor 'text_model.encoder.layers.2."),
    "fewer layers": (of_text(num_hidden_layers=1), "has an unknown tensor 'text_model.encoder.layers.1."),
    "no projection": (tensors(lambda w: w.pop("text_projection.weight")), "lacks tensor 'text_projection.weight'"),
    "no tokenizer": (removed("vocab.json"), "has no tokenizer.json; copy it"),
    "a damaged tokenizer": (filled("vocab.json", "{"), "its tokenizer cannot be read ("),
    "more tokens": (of_text(vocab_size=100), "tensor 'text_model.embeddings.token_embedding.weight' has shape"),
    "another's tokenizer": (
        lambda f: changed("vocab.json", further=len(vocabulary()[0]))(f),
        f"its tokenizer has {len(vocabulary()[0]) + 1} tokens, and config.json has vocab_size={len(vocabulary()[0])}",
    ),
    "no preparation": (removed("preprocessor_config.json"), "has no preprocessor_config.json; copy it"),
    "damaged preparation": (filled("preprocessor_config.json", "]"), "preprocessor_config.json: no picture can be"),
    "another's preparation": (
        changed("preprocessor_config.json", crop_size={"height": 24, "width": 24}),
        "makes pictures of 24×24, and config.json has image_size=32",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_no_clip_are_one_line(tmp_path: Path, case: str) -> None:
    harm, words = BAD[case]
    folder = tiny_clip.write(tmp_path / "clip")
    harm(folder)
    with pytest.raises(CalibError) as error:
        features(folder)
    assert words in str(error.value) and "\n" not in str(error.value) and str(folder) in str(error.value)


def test_weights_that_give_no_numbers(tmp_path: Path) -> None:
    folder = tiny_clip.write(tmp_path / "clip")
    tensors(lambda w: w.update({"visual_projection.weight": w["visual_projection.weight"] * np.nan}))(folder)
    with pytest.raises(CalibError, match="its features are not finite; copy the CLIP's files again"):
        features(folder).vectors([picture(0)])


def test_weights_in_several_files(tmp_path: Path) -> None:
    folder = tiny_clip.write(tmp_path / "clip")
    expected, whole = features(folder).vectors([picture(0)]), mx.load(str(folder / "model.safetensors"))
    assert isinstance(whole, dict)
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{number % 2}.safetensors" for number, name in enumerate(whole)}
    for file in set(names.values()):
        mx.save_safetensors(str(folder / file), {name: whole[name] for name in whole if names[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert np.array_equal(features(folder).vectors([picture(0)]), expected)
    (folder / "model-00001.safetensors").unlink()
    with pytest.raises(CalibError, match=r"model-00001.safetensors: no such file, and model.safetensors.index.json"):
        features(folder)


# In runs and of folders

MEASURES = ("clip_similarity", "clip_score", "cmmd")
SIZES = ("evaluation.num_images=4", "evaluation.steps=1", "sampler.num_steps=3", "sampler.batch_size=2")
ASKED = (f"evaluation.metrics=[psnr,ssim,{','.join(MEASURES)}]", "evaluation.clip=clip", "data_dir=dataset", *SIZES)


@pytest.fixture(scope="module")
def evaluated(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP, the run directory ``run`` of an evaluation by it, and the cache that this filled."""
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip.write(folder / "clip")
    well(run_in(folder, "evaluate", f"plan={tiny_run}", *ASKED, "hydra.run.dir=run"))
    return folder


@pytest.fixture
def calib(evaluated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Calib:
    monkeypatch.chdir(evaluated)
    return lambda *arguments: run_here(arguments, capsys)


def folders(*further: str, measures: str = ",".join(MEASURES)) -> tuple[str, ...]:
    return ("evaluate", f"run/{FULL_PICTURES}", f"run/{QUANTIZED_PICTURES}", "--metrics", measures, *further)


def test_a_run_has_scores_of_both_and_their_difference(calib: Calib, evaluated: Path) -> None:
    metrics, details = read_json(evaluated / "run" / METRICS), read_json(evaluated / "run" / DETAILS)
    own = features(evaluated / "clip", "another_cache")
    sides = [
        [np.asarray(Image.open(evaluated / "run" / folder / f"{number:04d}.png")) for number in range(4)]
        for folder in (FULL_PICTURES, QUANTIZED_PICTURES)
    ]
    before, after = (own.scores(pictures, details["prompts"]) for pictures in sides)
    further = details["quantized"]["further"]
    np.testing.assert_allclose(further["clip_score"], after, atol=1e-4)
    np.testing.assert_allclose(further["clip_score_change"], after - before, atol=1e-4)
    assert metrics["clip_score"] - metrics["clip_score_change"] == pytest.approx(before.mean(), abs=1e-4)
    assert metrics["clip_score_low"] < metrics["clip_score"] < metrics["clip_score_high"]
    assert metrics["clip_similarity"] < metrics["control_clip_similarity"] <= 1
    assert metrics["prompts_truncated"] == own.truncated(details["prompts"]) > 0
    lines = (evaluated / "run" / FIDELITY).read_text().splitlines()
    assert any(line.startswith("CLIP score (100·cosine with the prompt)") and line.count("[") == 2 for line in lines)
    assert "CLIP score: of too few prompts to be told from full precision's (paired by prompt, 95%)" in lines
    assert any(line.startswith("CMMD (U), U-statistic, lower is closer") and "over subsets" in line for line in lines)
    assert any(line.startswith("note: ") and "longer than the CLIP reads" in line for line in lines)
    page = (evaluated / "run" / PAGE).read_text()
    columns = {column["key"] for column in json.loads(well(calib("compare", "run", "--json")).out)["columns"]}
    assert columns >= {*MEASURES} and "CMMD (U)" in page
    assert "of too few prompts to be told from" in page and "longer than the CLIP reads" in page


def test_folders_have_the_same_figures_as_the_run(calib: Calib, evaluated: Path) -> None:
    metrics = read_json(evaluated / "run" / METRICS)
    command = folders("--clip", "clip", "--prompts", f"run/{DETAILS}")
    found = json.loads(well(calib(*command, "--json")).out)
    for name, own in found["measures"].items():
        assert metrics[name] == own["value"] and metrics[f"{name}_low"] == own["low"]
    assert set(found["measures"]) == {*MEASURES, "clip_score_change"}
    by_name = {f"{i:04d}.png": prompt for i, prompt in enumerate(read_json(evaluated / "run" / DETAILS)["prompts"])}
    Path("prompts.json").write_text(json.dumps(by_name))
    assert well(calib(*folders("--clip", "clip", "--prompts", "prompts.json"))).out == well(calib(*command)).out
    same = ("evaluate", f"run/{FULL_PICTURES}", f"run/{FULL_PICTURES}", "--clip", "clip", "--json")
    equal = json.loads(well(calib(*same, "--metrics", "clip_similarity,cmmd")).out)["measures"]
    assert equal["clip_similarity"]["value"] == 1 and equal["cmmd"]["value"] == 0


def test_the_worst_pairs_by_a_score_are_those_that_lost_most_of_it(calib: Calib, evaluated: Path) -> None:
    """Not those with the lowest scores, which may have had lower ones before."""
    command = folders("--clip", "clip", "--prompts", f"run/{DETAILS}", measures="clip_score")
    pairs = json.loads(well(calib(*command, "--json")).out)["pairs"]
    changes, scores = ([pair[name] for pair in pairs] for name in ("clip_score_change", "clip_score"))
    assert changes == sorted(changes) and scores != sorted(scores)
    assert "worst pairs by change of the CLIP score" in well(calib(*command)).out
    own = Fidelity.from_json(read_json(evaluated / "run" / DETAILS)["quantized"])
    categories = categories_of("Category", list("abcd"), ["clip_score", "psnr"], own)
    assert categories.worst_by == "clip_score_change"
    assert [own.further["clip_score_change"][place] for place in categories.order] == changes


def test_another_clip_of_the_same_name_is_another_job(calib: Calib, evaluated: Path, tiny_run: Path) -> None:
    """With sources, features and a control of its own."""
    command = ("evaluate", f"plan={tiny_run}", *ASKED, "hydra.run.dir=run")
    assert "Already complete" in well(calib(*command)).out
    settings = build(composed(*ASKED))
    made_by, sources = choose(MEASURES, Sources(Path("cache"), "clip")).made_by, reference_sources(settings)
    assert sources == [features(evaluated / "clip").content]
    Path("clip").rename("first")
    try:
        tiny_clip.write(Path("clip"), seed=1)
        assert choose(MEASURES, Sources(Path("cache"), "clip")).made_by != made_by
        assert reference_sources(settings) != sources
    finally:
        shutil.rmtree("clip")
        Path("first").rename("clip")
    assert build(composed(*ASKED, "evaluation.clip=other")).fingerprint != settings.fingerprint


WRONG: Mapping[tuple[str, ...], str] = {
    ("evaluation.metrics=[cmmd]",): "clip_similarity, clip_score, clip_score_change, cmmd are by a CLIP of your choice",
    ("evaluation.clip=clip",): "evaluation.clip=clip: no measure that is asked for reads it; it is for clip_similarity",
    ("evaluation.metrics=[cmmd]", "evaluation.clip=none"): "evaluation.clip=none: no such folder, nor a repository's",
    ("evaluation.metrics=[cmmd]", "evaluation.clip=run"): "evaluation.clip=run: has no config.json",
    ("evaluation.metrics=[cmmd]", "evaluation.clip=clip", "evaluation.num_images=3"): "of 4 pictures or more",
    folders(measures="clip_similarity"): "name its folder or its repository on the hub, --clip=openai/clip-vit-large",
    folders(
        "--clip", "clip"
    ): "--metrics=clip_score: reads the prompts; name their file, --prompts FILE: a JSON object",
    folders("--clip", "clip", "--prompts", "two.json"): "two.json: has no prompt for the picture 0002 and 1 more",
    folders("--clip", "clip", "--prompts", "list.json"): "list.json: must be a JSON object of prompts by",
    folders("--clip", "clip", "--prompts", "two.json", measures="cmmd"): "--prompts=two.json: only clip_score reads it",
    folders("--clip", "clip", measures="psnr"): "--clip=clip: no measure that is asked for reads it",
}


@pytest.mark.parametrize("command", WRONG, ids=lambda command: " ".join(command[-3:]))
def test_wrong_settings_are_one_line(calib: Calib, command: tuple[str, ...]) -> None:
    Path("two.json").write_text('{"0000": "a", "0001.PNG": "b"}')
    Path("list.json").write_text('["a", "b", "c", "d"]')
    outcome = calib(*command, *(() if command[0] == "evaluate" else ("hydra.run.dir=wrong",)))
    assert WRONG[command] in is_one_clear_line(outcome, outcome.status) and outcome.status in (1, 2)
    assert not Path("wrong").exists()


def test_a_repository_without_a_network(calib: Calib, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = is_one_clear_line(calib(*folders("--clip", "owner/clip", measures="cmmd")), 1)
    assert "--clip=owner/clip: not in the cache" in line and line.endswith("or name a folder, --clip=FOLDER")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *(((-2, -1), "worse than"), ((1, 3), "better than"), ((-1, 1), "not to be told from")),
        ((-2, -1, -3), "of too few prompts to be told from"),
    ],
)
def test_worse_is_said_where_the_interval_allows(change: tuple[float, ...], said: str) -> None:
    [line] = score_lines({"clip_score_change": np.array(change * 10 if len(change) == 2 else change)}, "A")
    assert line == f"CLIP score: {said} A's (paired by prompt, 95%)"
