"""The shipped model: it draws what it is asked for, and takes any text."""

from pathlib import Path

from calib.dataset.generate import trajectory
from calib.dataset.settings import SamplerSettings
from calib.models import emoji
from calib.models.emoji.architecture import END, EmojiConfig, EmojiTokenizer
from calib.models.model import DiffusionModel

import mlx.core as mx
import numpy as np
import pytest

#: 16x16 block means of training images, written by scripts/evaluate_emoji.py: the names drawn here come first, then
#: the emoji that look most like them.
THUMBNAILS = Path(__file__).parent / "data" / "emoji_thumbnails.npz"
MOST_BYTES = 32_000_000


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return emoji.load()


@pytest.fixture(scope="module")
def tokenizer() -> EmojiTokenizer:
    return EmojiTokenizer.load(emoji.FOLDER, EmojiConfig.load(emoji.FOLDER / "config.json").text_length)


@pytest.fixture(scope="module")
def references() -> tuple[list[str], np.ndarray]:
    """Names and thumbnails (n, 16, 16, 3) in [0, 1]."""
    with np.load(THUMBNAILS) as stored:
        return stored["names"].tolist(), stored["thumbnails"] / 255


@pytest.fixture(scope="module")
def drawn(model: DiffusionModel, references: tuple[list[str], np.ndarray]) -> np.ndarray:
    """Three names at 25 steps and CFG 3, (3, 64, 64, 3) in [0, 1]."""
    names = references[0][:3]
    *_, final = trajectory(model, names, range(len(names)), SamplerSettings(num_steps=25, cfg_weight=3.0))
    return np.array(model.decode(final.x))


def test_drawn_images_are_nearest_to_the_named_ones(drawn, references):
    names, thumbnails = references
    small = drawn.reshape(len(drawn), 16, 4, 16, 4, 3).mean(axis=(2, 4))
    distances = np.sqrt(((small[:, None] - thumbnails) ** 2).mean(axis=(2, 3, 4)))
    assert [names[i] for i in distances.argmin(axis=1)] == names[: len(drawn)]
    assert np.diagonal(distances).max() < 0.06, "nearest, and near"


def test_vae_keeps_a_drawn_image(model, drawn):
    mean, _ = mx.split(emoji.load_encoder()(mx.array(2 * drawn - 1)), 2, axis=-1)
    decoded = np.array(model.decode(model.latent_format.process_in(mean)))
    psnr = -10 * np.log10(((decoded - drawn) ** 2).mean(axis=(1, 2, 3)))
    assert psnr.min() >= 25


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "   ",
        "sparkles wombat",
        "xqzvk",
        "😀🎉",
        "日本語",
        "Ünïcödé",
        "it's 3 o'clock!",
        "\x00\n\t",
        END,
        "red " * 3000,
        "a" * 5000,
    ],
    ids=lambda prompt: repr(prompt[:16]),
)
def test_any_text_becomes_finite_conditioning(model, prompt):
    text = model.encode([prompt], cfg_weight=3.0)
    assert text.tokens.shape == (2, 16, 256)
    assert text.pooled.shape == (2, 256)
    assert np.isfinite(np.array(text.tokens)).all()
    assert np.isfinite(np.array(text.pooled)).all()


def test_unknown_words_draw_a_picture(model):
    *_, final = trajectory(model, ["flurbish wombat"], [7], SamplerSettings(num_steps=4, cfg_weight=3.0))
    image = np.array(model.decode(final.x))
    assert image.shape == (1, 64, 64, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.01, "not a blank"


def test_tokens(tokenizer):
    end = tokenizer("")[-1]
    vocabulary = tokenizer._bpe.vocab
    assert vocabulary[END] == end == max(vocabulary.values()), "CLIP pools at the largest id"
    assert sorted(vocabulary.values()) == list(range(EmojiConfig.load(emoji.FOLDER / "config.json").vocab_size))
    for text in ("red heart", "red " * 100):
        tokens = tokenizer(text)
        assert len(tokens) == 16
        assert tokens[-1] == end


def test_case_accents_and_spaces_do_not_matter(tokenizer):
    assert tokenizer("  RED\n heart ") == tokenizer("red heart")
    assert tokenizer("Côte d'Ivoire flag") == tokenizer("cote d'ivoire flag")


def test_no_training_name_is_cut(tokenizer):
    names = emoji.training_names()
    assert len(names) == 1911
    assert max(tokenizer(name).index(tokenizer("")[-1]) for name in names) < 15


def test_weights_are_small():
    assert sum(path.stat().st_size for path in emoji.FOLDER.glob("*.safetensors")) <= MOST_BYTES
