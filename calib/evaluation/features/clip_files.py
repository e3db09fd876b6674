"""Finds and checks the files of a CLIP that the user names: a folder, or a repository of the hub.

They are in the layout of transformers' ``CLIPModel``, whose configuration, tokenizer and image processor are used; its
network needs PyTorch. What is wrong is found from names, sizes and headers, before any tensor is read.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError, ConfigError, first_line
from calib.base.files import content_of, read_json, short_hash
from calib.base.safetensors import read_header
from calib.evaluation.features.clip import ACTIVATIONS, UNUSED, Clip, Sizes, Tower
from calib.models.hub import load_checked, what_to_do
from calib.models.tensors import check_tensors, read_weights

import mlx.core as mx
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from mlx.utils import tree_flatten
from numpy.typing import NDArray

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
#: One of each is enough; newer releases of transformers save the second of the processor's.
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
TOKENIZER = ("tokenizer.json", "vocab.json")
#: What of a repository is downloaded.
PATTERNS = (CONFIG, *PROCESSOR, "*token*.json", "vocab.json", "merges.txt", "model*.safetensors", INDEX)
SUPPORTED = "calib reads what transformers' CLIPModel does: OpenAI's CLIPs, and OpenCLIP's in that layout"
SAVED = "from pytorch_model.bin it is made by CLIPModel.from_pretrained(…).save_pretrained(FOLDER)"
#: Characters of a library's message.
_MOST = 120
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class ClipFiles:
    """The files of a CLIP, which fit together; tensors are read by :meth:`load`.

    Attributes:
        weights: one file, or several.
        tokenizer, processor: transformers' own, of texts and of pictures.
    """

    folder: Path
    sizes: Sizes
    weights: tuple[Path, ...]
    tokenizer: Any
    processor: Any

    @cached_property
    def content(self) -> str:
        """A hash of all that features depend on."""
        small = [self.sizes, self.processor.to_dict(), self.tokenizer.backend_tokenizer.to_str()]
        return short_hash([*map(content_of, self.weights), *map(str, small)], digits=16)

    def load(self) -> Clip:
        """Build the network and read its weights, in float32."""
        network, tensors = Clip(self.sizes), dict[str, mx.array]()
        for path in self.weights:
            tensors |= read_weights(str(path))
        load_checked(network, tensors, mx.float32, str(self.folder), UNUSED)
        return network


def open_clip(named: str, key: str) -> ClipFiles:
    """The files of the CLIP that ``key`` names, checked; those of a repository are downloaded once.

    Raises:
        CalibError: there is none, it is no CLIP, a file is missing or damaged, or files do not fit together.
    """
    folder = _folder(named, key)
    if not (folder / CONFIG).is_file():
        raise ConfigError.bad_value(key, named, f"has no {CONFIG}; {SUPPORTED}")
    sizes = _sizes(folder, key, named)
    for files in (PROCESSOR, TOKENIZER, (WEIGHTS, INDEX)):
        if not any((folder / file).is_file() for file in files):
            todo = SAVED if WEIGHTS in files else "copy it from where the CLIP is from"
            raise ConfigError.bad_value(key, named, f"has no {files[0]}; {todo}")
    weights = _weights(folder)
    shapes = {name: tensor.shape for path in weights for name, tensor in read_header(path).items()}
    wanted = {name: array.shape for name, array in dict(tree_flatten(Clip(sizes).parameters())).items()}
    check_tensors(shapes, wanted, str(folder), UNUSED)
    return ClipFiles(folder, sizes, weights, _tokenizer(folder, sizes), _processor(folder, sizes))


def _folder(named: str, key: str) -> Path:
    folder = Path(named).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not _REPOSITORY.fullmatch(named):
        raise ConfigError.bad_value(key, named, f"no such folder, nor a repository's name, OWNER/NAME; {SUPPORTED}")
    try:
        return Path(snapshot_download(named, allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CalibError(f"{key}={named}: {what_to_do(named, error)}; or name a folder, {key}=FOLDER") from None


def _sizes(folder: Path, key: str, named: str) -> Sizes:
    """The sizes in a configuration, what it leaves out as transformers has it."""
    from transformers import CLIPConfig  # slow to import, as the others of it below
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()  # what is wrong is said here
    path = folder / CONFIG
    document = read_json(path)
    kind = document.get("model_type") if isinstance(document, dict) else None
    if kind != "clip":
        raise ConfigError.bad_value(key, named, f"its {CONFIG} is of model_type {kind!r}, not 'clip'; {SUPPORTED}")
    try:
        config: Any = CLIPConfig.from_dict(document)
        text, vision = config.text_config, config.vision_config
        sizes = Sizes(
            *(_tower(text), _tower(vision)),
            *(text.vocab_size, text.max_position_embeddings),
            *(vision.image_size, vision.patch_size, config.projection_dim),
        )
        whole = (sizes.tokens, sizes.places, sizes.picture, sizes.patch, sizes.features)
        if any(not isinstance(size, int) or size < 1 for size in whole) or vision.num_channels != 3:
            raise ValueError("calib takes square pictures of three channels")
        if sizes.picture % sizes.patch:
            raise ValueError(f"image_size={sizes.picture} is not a multiple of patch_size={sizes.patch}")
    except Exception as error:  # transformers' checks raise what they like
        raise CalibError(f"{path}: is no CLIP's ({first_line(error)[:_MOST]}); copy it again") from None
    return sizes


def _tower(config: Any) -> Tower:
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act={config.hidden_act}; calib knows {' and '.join(ACTIVATIONS)}")
    sizes = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads)
    if min(sizes) < 1 or config.hidden_size % config.num_attention_heads:
        raise ValueError(f"width, inner, layers and heads of a tower: {sizes}")
    return Tower(*sizes, config.hidden_act, float(config.layer_norm_eps))


def _weights(folder: Path) -> tuple[Path, ...]:
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    document = read_json(folder / INDEX)
    try:
        names = sorted({str(name) for name in document["weight_map"].values()})
    except (KeyError, TypeError, AttributeError):
        raise CalibError(f"{folder / INDEX}: has no weight_map of files; copy it again") from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CalibError(f"{folder / name}: no such file, and {INDEX} names it; copy it, too")
    return tuple(folder / name for name in names)


def _tokenizer(folder: Path, sizes: Sizes) -> Any:
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder))
        end, count = tokenizer.eos_token_id, len(tokenizer)
    except Exception as error:
        reason = first_line(error)[:_MOST]
        raise CalibError(f"{folder}: its tokenizer cannot be read ({reason}); copy its files again") from None
    if count > sizes.tokens or end is None:
        wanted = f"{CONFIG} has vocab_size={sizes.tokens}"
        raise CalibError(f"{folder}: its tokenizer has {count} tokens, and {wanted}; copy both from one model")
    return tokenizer


def _processor(folder: Path, sizes: Sizes) -> Any:
    # Pillow's, as OpenAI's own code resizes by it; the other one is torchvision's.
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    file = next(name for name in PROCESSOR if (folder / name).is_file())
    try:
        processor = CLIPImageProcessorPil.from_pretrained(str(folder))
        found = prepared(processor, np.zeros((8, 16, 3), np.uint8)).shape
    except Exception as error:
        reason = first_line(error)[:_MOST]
        raise CalibError(f"{folder / file}: no picture can be prepared by it ({reason}); copy it again") from None
    if found != (3, sizes.picture, sizes.picture):
        made, wanted = "×".join(map(str, found[1:])), f"{CONFIG} has image_size={sizes.picture}"
        raise CalibError(f"{folder / file}: makes pictures of {made}, and {wanted}; copy both from one model")
    return processor


def prepared(processor: Any, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A picture (height, width, 3) as the network takes it, (3, size, size)."""
    found = processor(images=pixels, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]
    return np.asarray(found, np.float32)
