"""Compare calib's CLIP with transformers' on PyTorch: features of pictures and texts, preparation, and tokens.

In an environment of its own, as calib has no PyTorch; with calib, MLX and these from PyPI:

    pip install torch torchvision transformers
    python scripts/check_clip.py [CLIP…] [--picture PICTURE…]

CLIP is a folder or a repository of the hub; none given, small ones with random weights are made, of OpenAI's and of
OpenCLIP's activation, and of their older configurations. Prints the largest difference of features of unit length, and
of what transformers' processor on PyTorch makes of the pictures.
"""

import argparse
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import calib
from calib.evaluation.features.clip_features import ClipFeatures
from calib.evaluation.features.clip_files import open_clip, prepared

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

TEXTS = ("red apple", "a photo of a cat, Größe 日本", "", "one <|endoftext|> and more", "very " * 100 + "long")


def made(folder: Path) -> Iterator[str]:
    """Small CLIPs with random weights, in folders of their own."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(n) for n in [*printable, *range(256, 512 - len(printable))]]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({token: n for n, token in enumerate(tokens)}, [("r", "e"), ("re", "d</w>")])
    processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    for name, activation, end in (("openai", "quick_gelu", 2), ("openclip", "gelu", tokenizer.eos_token_id)):
        shape = {"num_hidden_layers": 3, "hidden_act": activation}
        text = {"vocab_size": len(tokens), "hidden_size": 64, "intermediate_size": 100, "num_attention_heads": 4}
        vision = {"hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 6, "image_size": 48}
        text |= {"eos_token_id": end, **shape}
        vision |= {"patch_size": 16, **shape}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=40)).eval()
        for key, values in model.named_parameters():  # of sizes with which every part of it counts
            size = 2 * values[0].numel() ** -0.5 if values.ndim > 1 and "embedding" not in key else 0.3
            torch.nn.init.normal_(values, mean=float("norm" in key and "weight" in key), std=size)
        for saved in (model, tokenizer, processor):
            saved.save_pretrained(folder / name)
        yield str(folder / name)


def check(named: str, shown: dict[str, np.ndarray], cache_dir: Path) -> None:
    files, own = open_clip(named, "clip"), ClipFeatures(named, "clip", cache_dir)
    model = CLIPModel.from_pretrained(files.folder, dtype=torch.float32).eval()
    tokens = files.tokenizer(
        list(TEXTS), padding=True, truncation=True, max_length=own.most_tokens, return_tensors="pt"
    )
    x = torch.from_numpy(np.stack([prepared(files.processor, pixels) for pixels in shown.values()]))
    with torch.no_grad():
        outputs = model(pixel_values=x, **tokens)
    texts, pictures = own.texts(TEXTS), own.vectors(list(shown.values()))
    print(f"{named} ({files.content}): {own.truncated(TEXTS)} of {len(TEXTS)} texts cut off")
    print(f"  texts {np.abs(texts - outputs.text_embeds.numpy()).max():.1e}")
    print(f"  pictures {np.abs(pictures - outputs.image_embeds.numpy()).max():.1e}")
    cosines = (outputs.image_embeds @ outputs.text_embeds.T).numpy()
    scores = np.stack([own.scores([pixels] * len(TEXTS), TEXTS) for pixels in shown.values()])
    largest = np.abs(scores - 100 * np.maximum(cosines, 0)).max()
    print(f"  CLIP scores {largest:.1e}, of {scores.min():.2f} to {scores.max():.2f}")
    if find_spec("torchvision") is None:
        return
    from transformers.models.clip.image_processing_clip import CLIPImageProcessor

    theirs = CLIPImageProcessor.from_pretrained(files.folder)
    others = theirs(images=[Image.fromarray(pixels) for pixels in shown.values()], return_tensors="pt")["pixel_values"]
    print(f"  preparation by torchvision {float((others - x).abs().max()):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", metavar="CLIP", nargs="*")
    parser.add_argument("--picture", metavar="PICTURE", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    print(f"calib {calib.__version__}, PyTorch {torch.__version__}")
    rng = np.random.RandomState(0)
    torch.manual_seed(2)
    shown = {str(p): np.asarray(Image.open(p).convert("RGB")) for p in given.picture}
    for width, height in ((64, 64), (224, 224), (300, 500)):
        shown[f"noise of {width}×{height}"] = rng.randint(0, 256, (height, width, 3)).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        for named in given.clips or made(Path(folder)):
            check(named, shown, Path(folder) / "cache")


if __name__ == "__main__":
    main()
