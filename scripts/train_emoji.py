"""Train the shipped emoji model in MLX, on a GPU.

Data: the npm package emoji-datasource-google 16.0.0 (1,911 Noto emoji as 64x64 PNG, with their Unicode names)::

    npm pack emoji-datasource-google@16.0.0
    tar xzf emoji-datasource-google-16.0.0.tgz package/emoji.json package/img/google/64
    python scripts/train_emoji.py --data package --out calib/models/emoji
    python scripts/evaluate_emoji.py --data package
    python scripts/make_selftest.py

The defaults are the settings of the shipped weights: --vae-steps 3000 --steps 10000 --batch 512 --lr 1e-3 and the
sizes of EmojiConfig. On one NVIDIA H200 (MLX 0.32.4, CUDA 13) the VAE took 275 s, transformer and text encoder 400 s.
Every random choice is seeded, but a GPU adds up in varying order, so another run gives other weights. The last two
commands measure them and store what ``calib doctor --selftest`` compares with.

Three parts. A byte-pair vocabulary is learned from the names. A VAE is trained on the images. An MMDiT and its
text encoder are trained together by rectified flow (Liu et al. 2022, arXiv 2209.03003; logit-normal sigmas as in
SD3, Esser et al. 2024, arXiv 2403.03206, section 3.1) on the VAE's standardised latents. Weights are exponential
moving averages, stored in float16. Every phase writes its result to --out when it ends.

Needs ``tokenizers`` (a dependency of transformers) besides calib.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import calib  # noqa: F401  (loads the BLAS before MLX)
from calib.models.emoji.architecture import (
    BEGIN,
    END,
    EmojiConfig,
    EmojiTokenizer,
    build_decoder,
    build_encoder,
    build_text_encoder,
    build_transformer,
)
from calib.models.mmdit.modulation import modulation

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from PIL import Image

EMPTY_PROMPT_RATE = 0.1
KL_WEIGHT = 1e-4


def read_emoji(folder: Path) -> tuple[np.ndarray, list[list[str]]]:
    """Images over white, (n, 64, 64, 3) float32 in [-1, 1], and the names of each: Unicode name first, then aliases."""
    images, names = [], []
    for entry in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
        path = folder / "img" / "google" / "64" / entry["image"]
        if not path.exists():
            continue
        picture = Image.open(path).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        images.append(np.asarray(white.convert("RGB"), dtype=np.float32) / 127.5 - 1)
        aliases = [alias.replace("_", " ").replace("-", " ") for alias in entry["short_names"]]
        names.append([entry["name"].lower(), *aliases])
    return np.stack(images), names


def learn_vocabulary(names: list[list[str]], size: int, folder: Path) -> None:
    """Write vocab.json and merges.txt: a byte-pair vocabulary in CLIP's form, the end token having the largest id."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    pattern = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    model.pre_tokenizer = pre_tokenizers.Split(pattern, "removed", invert=True)
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1) if chr(c).lower() == chr(c)]
    # Merges of equal count go by token id: given in order here, not by a hash table, they come out the same each time.
    endings = [letter + "</w>" for letter in letters]
    trainer = trainers.BpeTrainer(
        vocab_size=8 * size, special_tokens=endings, initial_alphabet=letters, end_of_word_suffix="</w>"
    )
    model.train_from_iterator([name for group in names for name in group], trainer)
    merges = json.loads(model.to_str())["model"]["merges"]
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in merges]
    tokens = letters + endings
    merges = merges[: size - len(tokens) - 2]
    tokens += ["".join(merge) for merge in merges]
    tokens += [f"<|unused{i}|>" for i in range(size - len(tokens) - 2)] + [BEGIN, END]
    assert len(tokens) == len(set(tokens)) == size, "vocabulary has repeats"
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}) + "\n")
    (folder / "merges.txt").write_text("\n".join(" ".join(merge) for merge in merges) + "\n")
    (folder / "names.txt").write_text("\n".join(group[0] for group in names) + "\n", encoding="utf-8")


def learning_rate(peak: float, steps: int, warmup: int) -> Callable[[mx.array], mx.array]:
    rise = optim.linear_schedule(0.0, peak, warmup)
    fall = optim.cosine_decay(peak, max(steps - warmup, 1), peak * 0.01)
    schedule: Callable[[mx.array], mx.array] = optim.join_schedules([rise, fall], [warmup])
    return schedule


def save_half(path: Path, weights: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(path), {name: value.astype(mx.float16) for name, value in weights.items()})
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB", flush=True)


def fit(
    model: nn.Module,
    loss_of: Callable[..., mx.array],
    batches: Iterator[tuple[mx.array, ...]],
    steps: int,
    peak: float,
    decay: float,
    label: str,
) -> dict[str, mx.array]:
    """Minimise ``loss_of(model, *batch)`` with AdamW; returns the moving average of the weights."""
    optimizer = optim.AdamW(learning_rate=learning_rate(peak, steps, min(500, steps // 10 + 1)), weight_decay=0.01)
    optimizer.init(model.trainable_parameters())
    average = tree_map(lambda p: mx.array(p), model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]
    gradient = nn.value_and_grad(model, partial(loss_of, model))

    @partial(mx.compile, inputs=state, outputs=state)
    def step(average: Any, keep: mx.array, *batch: mx.array) -> tuple[mx.array, Any]:
        loss, grads = gradient(*batch)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        average = tree_map(lambda a, p: keep * a + (1 - keep) * p, average, model.trainable_parameters())
        return loss, average

    start, recent = time.time(), []
    for i in range(steps):
        keep = mx.array(min(decay, (1 + i) / (10 + i)))
        loss, average = step(average, keep, *next(batches))
        mx.eval(loss, average, state)
        recent.append(loss.item())
        if (i + 1) % max(steps // 40, 1) == 0 or i in (0, 20, 100):
            rate = (time.time() - start) / (i + 1)
            print(f"{label} step {i + 1}/{steps} loss {np.mean(recent):.5f} {1e3 * rate:.1f} ms/step", flush=True)
            recent = []
    return dict(tree_flatten(average))


class VAE(nn.Module):
    """Encoder and decoder side by side, so that one optimizer trains both."""

    def __init__(self, config: EmojiConfig):
        super().__init__()
        self.encoder, self.decoder = build_encoder(config), build_decoder(config)


def vae_loss(model: VAE, images: mx.array) -> mx.array:
    mean, logvar = mx.split(model.encoder(images), 2, axis=-1)
    logvar = mx.clip(logvar, -30.0, 20.0)
    z = mean + mx.exp(0.5 * logvar) * mx.random.normal(mean.shape)
    error = mx.mean((model.decoder(z) - images) ** 2)
    divergence = 0.5 * mx.mean(mean**2 + mx.exp(logvar) - 1 - logvar)
    loss: mx.array = error + KL_WEIGHT * divergence
    return loss


def image_batches(images: np.ndarray, size: int, seed: int) -> Iterator[tuple[mx.array, ...]]:
    rng, data = np.random.RandomState(seed), mx.array(images)
    while True:
        order = rng.permutation(len(images))
        for start in range(0, len(order) - size + 1, size):
            yield (data[mx.array(order[start : start + size])],)


def train_vae(config: EmojiConfig, images: np.ndarray, steps: int, out: Path) -> EmojiConfig:
    """Train the VAE and return the configuration with the latents' scale and shift filled in."""
    model = VAE(config)
    weights = fit(model, vae_loss, image_batches(images, 128, seed=0), steps, 1e-3, 0.999, "vae")
    model.load_weights(list(weights.items()))
    save_half(out / "vae.safetensors", weights)
    latents = encode_all(model.encoder, images)
    squares = [
        float(mx.mean((mx.clip(model.decoder(latents[i : i + 64]), -1, 1) - mx.array(images[i : i + 64])) ** 2)) / 4
        for i in range(0, len(images), 64)
    ]
    print(f"vae PSNR over the training images (pooled error): {-10 * np.log10(np.mean(squares)):.2f} dB", flush=True)
    mean, std = float(mx.mean(latents)), float(mx.std(latents))
    return dataclasses.replace(config, latent_scale=1 / std, latent_shift=mean)


def encode_all(encoder: nn.Module, images: np.ndarray) -> mx.array:
    """Latent means of all images, (n, height, width, channels)."""
    parts = []
    for i in range(0, len(images), 64):
        parts.append(mx.split(encoder(mx.array(images[i : i + 64])), 2, axis=-1)[0])
        mx.eval(parts[-1])
    return mx.concatenate(parts)


class TextToLatent(nn.Module):
    """The transformer and its text encoder side by side, so that one optimizer trains both."""

    def __init__(self, config: EmojiConfig):
        super().__init__()
        self.transformer, self.text = build_transformer(config), build_text_encoder(config)
        # Zero initialisation of the modulations and of the output: every block starts as the identity.
        for name, module in self.transformer.named_modules():
            if name.endswith("adaLN_modulation.layers.1") or name == "final_layer.linear":
                module.weight, module.bias = mx.zeros_like(module.weight), mx.zeros_like(module.bias)
        self.transformer.x_pos_embedder.pos_embed.weight *= 0.02 * config.hidden_size**0.5


def flow_loss(model: TextToLatent, latents: mx.array, tokens: mx.array) -> mx.array:
    sigma = mx.sigmoid(mx.random.normal((latents.shape[0],)))
    noise = mx.random.normal(latents.shape)
    s = sigma[:, None, None, None]
    x = (1 - s) * latents + s * noise
    text = model.text(tokens)
    with modulation(model.transformer, text.pooled_output, 1000 * sigma, key=0.0):
        v = model.transformer(x, text.last_hidden_state[:, :, None, :], TIMESTEP_ZERO)
    return mx.mean((v - (noise - latents)) ** 2)


class TimestepZero:
    """Stands for the timestep inside a compiled loss, where reading an array's value is not possible.

    The blocks only look up their modulations by it; those are already computed, per row, from the true timesteps.
    """

    size = 1

    def item(self) -> float:
        return 0.0


TIMESTEP_ZERO: Any = TimestepZero()


def pair_batches(latents: mx.array, tokens: list[np.ndarray], empty: np.ndarray, size: int) -> Iterator[Any]:
    """Random (latents, tokens) pairs: half Unicode names, half any alias, a tenth of the prompts empty."""
    rng = np.random.RandomState(1)
    while True:
        index = rng.randint(0, len(tokens), size)
        pick = [0 if rng.rand() < 0.5 else rng.randint(len(tokens[i])) for i in index]
        rows = np.stack([tokens[i][p] for i, p in zip(index, pick, strict=True)])
        rows[rng.rand(size) < EMPTY_PROMPT_RATE] = empty
        yield latents[mx.array(index)], mx.array(rows)


def train_transformer(
    config: EmojiConfig, images: np.ndarray, names: list[list[str]], steps: int, batch: int, lr: float, out: Path
) -> None:
    encoder = build_encoder(config)
    encoder.load_weights(encoder_weights(out / "vae.safetensors"))
    latents = (encode_all(encoder, images) - config.latent_shift) * config.latent_scale
    tokenizer = EmojiTokenizer.load(out, config.text_length)
    tokens = [np.array([tokenizer(name) for name in group]) for group in names]
    batches = pair_batches(latents, tokens, np.array(tokenizer("")), batch)
    weights = fit(TextToLatent(config), flow_loss, batches, steps, lr, 0.9995, "mmdit")
    for part in ("transformer", "text"):
        prefix = part + "."
        chosen = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        save_half(out / f"{part}.safetensors", chosen)


def encoder_weights(path: Path) -> list[tuple[str, mx.array]]:
    weights = mx.load(str(path))
    return [
        (name.removeprefix("encoder."), value.astype(mx.float32))
        for name, value in weights.items()
        if name.startswith("encoder.")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with emoji.json and img/google/64")
    parser.add_argument("--out", type=Path, required=True, help="where weights and vocabulary go")
    parser.add_argument("--config", type=Path, help="an EmojiConfig as JSON; default: the dataclass's defaults")
    parser.add_argument("--vae-steps", type=int, default=3000, help="0 keeps the VAE that is in --out")
    parser.add_argument("--steps", type=int, default=10000, help="0 stops after the VAE")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    mx.random.seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    images, names = read_emoji(args.data)
    config = EmojiConfig.load(args.config) if args.config else EmojiConfig()
    if args.vae_steps:
        learn_vocabulary(names, config.vocab_size, args.out)
        config = train_vae(config, images, args.vae_steps, args.out)
        config.save(args.out / "config.json")
    if args.steps:
        config = EmojiConfig.load(args.out / "config.json")
        train_transformer(config, images, names, args.steps, args.batch, args.lr, args.out)


if __name__ == "__main__":
    main()
