"""The folders that mflux reads its models from: found, downloaded, read and checked.

mflux's own loader ignores names that it does not know and leaves what is missing as it was; here every name and shape
must fit. Names are mapped, and arrays turned, by mflux.
"""

import json
import logging
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError, ConfigError, reason_of
from calib.base.progress import counted, note
from calib.models.hub import load_checked, what_to_do
from calib.models.mflux.precision import in_precision
from calib.models.tensors import read_weights

import mlx.core as mx
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from mflux.models.common.resolution.model_revisions import ModelRevisions
from mflux.models.common.resolution.path_resolution import PathResolution
from mflux.models.common.tokenizer.tokenizer import LanguageTokenizer
from mflux.models.common.tokenizer.tokenizer_loader import TokenizerLoader
from mflux.models.common.weights.loading.weight_definition import ComponentDefinition
from mflux.models.common.weights.loading.weight_loader import WeightLoader
from mflux.models.common.weights.mapping.weight_mapper import WeightMapper
from mflux.utils.exceptions import ModelConfigError
from mlx import nn
from mlx.utils import tree_flatten

#: A component's file that states its sizes.
SIZES_IN = "config.json"


def check_folder(checkpoint: str, definition: Any) -> Path:
    """The folder ``model.checkpoint``; raises where it lacks a component of mflux's weight ``definition``."""
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        allowed = "no such folder; name one in the hub's layout or saved by mflux, or leave it out for the hub's"
        raise ConfigError.bad_value("model.checkpoint", checkpoint, allowed)
    for component in definition.get_components():
        if not any((folder / component.hf_subdir).glob("*.safetensors")):
            lacks = f"has no {component.hf_subdir}/*.safetensors; is it the right model's?"
            raise ConfigError.bad_value("model.checkpoint", checkpoint, lacks)
    for tokenizer in definition.get_tokenizers():
        if not (folder / tokenizer.hf_subdir).is_dir():
            lacks = f"has no {tokenizer.hf_subdir}/; copy it from the model's repository"
            raise ConfigError.bad_value("model.checkpoint", checkpoint, lacks)
    return folder


def known_folder(repository: str, checkpoint: str | None, definition: Any) -> Path | None:
    """The model's folder where it is here already: ``checkpoint``, or the repository's in the hub's cache."""
    if checkpoint is not None:
        return check_folder(checkpoint, definition)
    component = definition.get_components()[0].hf_subdir
    config = try_to_load_from_cache(repository, f"{component}/{SIZES_IN}", revision=ModelRevisions.get(repository))
    return Path(config).parents[1] if isinstance(config, str) else None


def folder_of(repository: str, checkpoint: str | None, definition: Any) -> Path:
    """The folder of a model: ``checkpoint``, or the repository's in the hub's cache, downloaded once."""
    if checkpoint is not None:
        return check_folder(checkpoint, definition)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):  # mflux says there that it downloads
            return Path(PathResolution.resolve(repository, definition.get_download_patterns()))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CalibError(f"{repository}: {what_to_do(repository, error)}; or give model.checkpoint=DIR") from None


def sizes(folder: Path | None, component: str, names: Mapping[str, str]) -> dict[str, Any]:
    """The sizes that a component's ``config.json`` states, by mflux's names for them; ``names`` maps theirs to those.

    Empty without a folder or file, as mflux saves none: then mflux's own sizes hold.
    """
    if folder is None or not (path := folder / component / SIZES_IN).is_file():
        return {}
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
        return {ours: stated[theirs] for theirs, ours in names.items() if theirs in stated}
    except (OSError, ValueError, TypeError) as error:
        raise CalibError(f"{path}: is not readable ({reason_of(error)}); copy it again") from None


def component_of(definition: Any, name: str) -> ComponentDefinition:
    """mflux's definition of the component ``name``."""
    return next(component for component in definition.get_components() if component.name == name)


def component_for(definition: Any, name: str, module: nn.Module) -> ComponentDefinition:
    """The same for as many layers as ``module`` has: mflux counts blocks of most kinds, and has others in its code."""
    found = component_of(definition, name)
    own = module.encoder if hasattr(module, "encoder") else module
    if hasattr(own, "layers"):
        return replace(found, num_layers=len(own.layers))
    if hasattr(own, "t5_blocks"):
        blocks = len(own.t5_blocks)
        mapping = [replace(to, max_blocks=to.max_blocks and blocks) for to in found.mapping_getter()]
        return replace(found, num_blocks=blocks, mapping_getter=lambda: mapping)
    return found


def load_component(
    module: nn.Module, folder: Path, component: ComponentDefinition, dtype: mx.Dtype, unused: tuple[str, ...] = ()
) -> None:
    """Load a component's weights into ``module``, in ``dtype``; ``unused`` as in :func:`checked`."""
    weights = component_weights(folder, component, dtype, unused)
    load_checked(module, weights, dtype, str(folder / component.hf_subdir), unused)


def component_weights(
    folder: Path, component: ComponentDefinition, dtype: mx.Dtype, unused: tuple[str, ...] = ()
) -> dict[str, mx.array]:
    """A component's weights by mflux's paths, in the files' types; lazy."""
    place = folder / component.hf_subdir
    try:
        with in_precision(dtype):
            loaded = WeightLoader.load_single_local(replace(component, precision=None), folder)
    except (ModelConfigError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise CalibError(f"{place}: {reason_of(error)}") from None
    if (bits := loaded.meta_data.quantization_level) is not None:
        raise CalibError(f"{place}: its weights have {bits} bits already, calib needs those of 16 bits")
    if loaded.meta_data.mflux_version is None:
        _note_unread(place, component, unused)
    return dict(tree_flatten(loaded.components[component.name]))


def _note_unread(place: Path, component: ComponentDefinition, unused: tuple[str, ...]) -> None:
    """Note tensors in the hub's naming that mflux's mapping leaves out: of further blocks, say."""
    names = {name: mx.array(0) for file in place.glob("*.safetensors") for name in read_weights(str(file))}
    left = WeightMapper.unmapped_names(names, component.mapping_getter(), component.num_blocks, component.num_layers)
    if left := [name for name in left if not any(part in name for part in unused)]:
        note(f"{place}: holds {counted(len(left), 'tensor')} that mflux does not read, {left[0]!r} first")


def tokenizers_of(definition: Any, folder: Path, lengths: Mapping[str, int]) -> list[LanguageTokenizer]:
    """A model's tokenizers; ``lengths``: the tokens of a text, by tokenizer, where not the definition's."""
    found = []
    for own in definition.get_tokenizers():
        try:
            made = TokenizerLoader.load(own, str(folder))
        except (OSError, RuntimeError, ValueError) as error:
            raise CalibError(f"{folder / own.hf_subdir}: {reason_of(error.__cause__ or error)}") from None
        assert isinstance(made, LanguageTokenizer)
        made.max_length = lengths.get(own.name, made.max_length)
        found.append(made)
    return found
