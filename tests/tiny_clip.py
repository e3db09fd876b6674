"""A CLIP of a few thousand random weights in the layout of transformers' ``CLIPModel``, and its towers in float64."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, NDArray[np.float32]]

SIZE, PATCH, FEATURES, PLACES, LAYERS, HEADS = 32, 8, 16, 12, 2, 2
TEXT, VISION, INNER = 24, 20, 40
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """Tokens and merges: the letters for bytes, alone and at the ends of words, a word, begin and end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(n) for n in [*printable, *range(256, 512 - len(printable))]]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, ["r e", "re d</w>"]


def config(activation: str = "quick_gelu") -> dict[str, Any]:
    tower = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER}
    tower |= {"hidden_act": activation, "projection_dim": FEATURES}
    text = {"hidden_size": TEXT, "vocab_size": len(vocabulary()[0]), "max_position_embeddings": PLACES, **tower}
    vision = {"hidden_size": VISION, "image_size": SIZE, "patch_size": PATCH, **tower}
    return {"model_type": "clip", "projection_dim": FEATURES, "text_config": text, "vision_config": vision}


def weights(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Tensors by name, of sizes with which every part of the network counts; also one that features do not need."""
    shapes: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.token_embedding.weight": (len(vocabulary()[0]), TEXT),
        "text_model.embeddings.position_embedding.weight": (PLACES, TEXT),
        "vision_model.embeddings.class_embedding": (VISION,),
        "vision_model.embeddings.patch_embedding.weight": (VISION, 3, PATCH, PATCH),
        "vision_model.embeddings.position_embedding.weight": (1 + (SIZE // PATCH) ** 2, VISION),
        "text_projection.weight": (FEATURES, TEXT),
        "visual_projection.weight": (FEATURES, VISION),
        "logit_scale": (),
    }
    norms = {"text_model.final_layer_norm": TEXT, "vision_model.pre_layrnorm": VISION}
    norms["vision_model.post_layernorm"] = VISION
    for tower, width in (("text_model", TEXT), ("vision_model", VISION)):
        for layer in (f"{tower}.encoder.layers.{n}" for n in range(LAYERS)):
            linear = {f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
            linear |= {"mlp.fc1": (INNER, width), "mlp.fc2": (width, INNER)}
            shapes |= {f"{layer}.{name}.weight": shape for name, shape in linear.items()}
            shapes |= {f"{layer}.{name}.bias": shape[:1] for name, shape in linear.items()}
            norms |= {f"{layer}.layer_norm1": width, f"{layer}.layer_norm2": width}
    shapes |= {f"{name}.{part}": (width,) for name, width in norms.items() for part in ("weight", "bias")}
    rng, found = np.random.RandomState(seed), {}
    for name, shape in shapes.items():
        drawn = rng.randn(*shape) * (2 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.3)
        found[name] = np.asarray(drawn + (name.rpartition(".")[0] in norms and name.endswith("weight")), np.float32)
    return found


def write(folder: Path, seed: int = 0, activation: str = "quick_gelu", dtype: mx.Dtype = mx.float32) -> Path:
    """Write the files of a CLIP into ``folder``, which is returned."""
    folder.mkdir(parents=True)
    tokens, merges = vocabulary()
    texts = {"config.json": json.dumps(config(activation)), "vocab.json": json.dumps(tokens)}
    texts["merges.txt"] = "\n".join(["#version: 0.2", *merges, ""])
    side = {"height": SIZE, "width": SIZE}
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE}, "crop_size": side}
    texts["preprocessor_config.json"] = json.dumps(processor | {"image_mean": MEAN, "image_std": STD})
    for name, text in texts.items():
        (folder / name).write_text(text)
    arrays = {name: mx.array(array).astype(dtype) for name, array in weights(seed).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder


# In float64


def _norm(w: Weights, name: str, x: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def _linear(w: Weights, name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T.astype(np.float64) + w[f"{name}.bias"]


def _activated(x: Array, activation: str) -> Array:
    if activation == "quick_gelu":
        return x / (1 + np.exp(-1.702 * x))
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _tower(w: Weights, name: str, x: Array, causal: bool, activation: str) -> Array:
    """The layers of a tower, of one row (tokens, width)."""
    size = x.shape[1] // HEADS
    for layer in (f"{name}.encoder.layers.{n}" for n in range(LAYERS)):
        y = _norm(w, f"{layer}.layer_norm1", x)
        q, k, v = (_linear(w, f"{layer}.self_attn.{part}_proj", y) for part in "qkv")
        heads = []
        for head in (slice(n * size, (n + 1) * size) for n in range(HEADS)):
            scores = q[:, head] @ k[:, head].T / math.sqrt(size)
            if causal:
                scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads.append(shares / shares.sum(axis=1, keepdims=True) @ v[:, head])
        x = x + _linear(w, f"{layer}.self_attn.out_proj", np.concatenate(heads, axis=1))
        y = _activated(_linear(w, f"{layer}.mlp.fc1", _norm(w, f"{layer}.layer_norm2", x)), activation)
        x = x + _linear(w, f"{layer}.mlp.fc2", y)
    return x


def _unit(x: Array) -> Array:
    return x / np.linalg.norm(x)


def of_tokens(w: Weights, tokens: list[int], activation: str = "quick_gelu") -> Array:
    """Features of a text's tokens, up to its end."""
    x = w["text_model.embeddings.token_embedding.weight"][tokens].astype(np.float64)
    x = x + w["text_model.embeddings.position_embedding.weight"][: len(tokens)]
    x = _norm(w, "text_model.final_layer_norm", _tower(w, "text_model", x, True, activation)[-1])
    return _unit(w["text_projection.weight"] @ x)


def of_picture(w: Weights, pixels: NDArray[np.uint8], activation: str = "quick_gelu") -> Array:
    """Features of a picture that has the network's size."""
    x = (pixels / 255 - MEAN) / STD
    kernel = w["vision_model.embeddings.patch_embedding.weight"].astype(np.float64)
    places = range(0, SIZE, PATCH)
    patches = [np.einsum("hwc,ochw->o", x[i : i + PATCH, j : j + PATCH], kernel) for i in places for j in places]
    x = np.stack([w["vision_model.embeddings.class_embedding"], *patches])
    x = _norm(w, "vision_model.pre_layrnorm", x + w["vision_model.embeddings.position_embedding.weight"])
    x = _norm(w, "vision_model.post_layernorm", _tower(w, "vision_model", x, False, activation)[0])
    return _unit(w["visual_projection.weight"] @ x)
