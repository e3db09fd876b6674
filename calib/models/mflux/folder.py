"""A folder that mflux loads, with a quantized transformer: checked by mflux's own code, and written a piece at a time.

mflux tells each component's form by its own files: a transformer as mflux saves it goes with others in the hub's
layout. It tells bits and group sizes by shapes, ignores names that it does not know, and leaves what is missing as it
was; so what it would hold after loading is compared with what is to be written.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError, ConfigError, reason_of
from calib.base.files import write_json
from calib.base.safetensors import copy_file, in_shards, read_header, write
from calib.models.mflux import TESTED, note_version
from calib.models.mflux.family import UNUSED, Family
from calib.models.mflux.files import component_of, known_folder
from calib.models.model import weights as weights_of

import mlx.core as mx
from huggingface_hub import constants
from mflux.models.common.tokenizer.tokenizer_loader import TokenizerLoader
from mflux.models.common.weights.loading.loaded_weights import LoadedWeights, MetaData
from mflux.models.common.weights.loading.weight_applier import WeightApplier
from mflux.models.common.weights.loading.weight_loader import WeightLoader
from mflux.utils.exceptions import ModelConfigError
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

#: Name of the component that is replaced.
TRANSFORMER = "transformer"
#: A file of weights is at most this large, as mflux saves them.
LARGEST_FILE = 2 << 30
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Folder:
    """A folder to be written.

    Attributes:
        weights: the file with the transformer's tensors, by the names that mflux has for them.
        level: the bits that mflux is told, which say that the transformer is quantized.
        base: where the other components' files are.
        others: those files, by their place in ``base``.
    """

    family: Family
    weights: Path
    level: int
    base: Path
    others: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that are written; what is linked is not."""
        copied = (self.base / other for other in self.others if not _can_link(self.base / other))
        return sum(path.stat().st_size for path in (self.weights, *copied))

    def write(self, into: Path, advance: Callable[[int], object]) -> None:
        """Write all files into the empty folder ``into``; ``advance`` is told of bytes written."""
        place = into / component_of(self.family.definition, TRANSFORMER).hf_subdir
        place.mkdir(parents=True)
        metadata, places = {"quantization_level": str(self.level), "mflux_version": TESTED}, dict[str, str]()
        for number, shard in enumerate(in_shards(read_header(self.weights), LARGEST_FILE)):
            name = f"{number}{_SUFFIX}"
            write(place / name, self.weights, shard, metadata, advance)
            places |= dict.fromkeys(shard, name)
        write_json(place / f"model{_SUFFIX}.index.json", {"metadata": metadata, "weight_map": places})
        for other in self.others:
            (into / other).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(into / other, self.base / other, advance)


def folder_for(
    family: Family, about: Mapping[str, Any], weights: Path, arrays: Mapping[str, mx.array], base: Path, bits: float
) -> Folder:
    """The folder of a quantized transformer, all of it checked.

    Args:
        about: sizes of the transformer.
        weights: the file with ``arrays``, which are lazy: none is read.
        base: has the other components and the tokenizers, in the hub's layout or saved by mflux.
        bits: of a weight on average.

    Raises:
        ConfigError: ``base`` lacks a component or is another model's.
        CalibError: mflux would not hold these weights after loading.
    """
    note_version()
    level = min((2, 3, 4, 5, 6, 8), key=lambda known: abs(known - bits))
    definition = family.definition
    transformer = component_of(definition, TRANSFORMER)
    for fault in faults_of(family, transformer.name, family.architecture(dict(about)).module, arrays, level):
        raise CalibError(f"{weights}: {fault}")
    others = tuple(_files_of(family, base))
    for name, skeleton in family.components(base).items():
        _check_component(family, base, name, skeleton)
    for tokenizer in definition.get_tokenizers():
        try:
            TokenizerLoader.load(tokenizer, str(base))
        except (OSError, RuntimeError, ValueError) as error:
            raise CalibError(f"{base / tokenizer.hf_subdir}: {reason_of(error.__cause__ or error)}") from None
    return Folder(family, weights, level, base, others)


def base_of(family: Family, given: Path | None, repository: str | None) -> Path:
    """The folder with the other components: ``given``, or a repository's in the hub's cache; nothing is downloaded."""
    if given is not None:
        if not given.is_dir():
            raise ConfigError(f"--base {given}: no such folder; name one of the model's in the hub's layout")
        return given.absolute()
    cached = None if repository is None else known_folder(repository, None, family.definition)
    if cached is None:
        get = "" if repository is None else f", or run hf download {repository}"
        lacking = f"--base is not set, and {repository or 'the model'} is not in the hub's cache"
        raise ConfigError(f"{lacking}; name a folder with text encoder, decoder and tokenizer, --base DIR{get}")
    return cached


def faults_of(
    family: Family, name: str, module: nn.Module, arrays: Mapping[str, mx.array], level: int | None
) -> Iterator[str]:
    """What of ``arrays`` mflux would not hold after loading them into ``module``, a component without weights.

    ``module`` is loaded by mflux; nothing is computed.
    """
    dense = {path: weight.shape for path, weight in weights_of(module).items()}
    weights = LoadedWeights({name: tree_unflatten(list(arrays.items()))}, MetaData(level, TESTED))
    with redirect_stdout(io.StringIO()):  # of layers whose bits it cannot tell, which are found below
        try:
            WeightApplier.apply_and_quantize(weights, {name: module}, None, family.definition)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            yield f"mflux does not load it ({reason_of(error)})"
            return
    expected = {path: dense.get(path, ()) for path in weights_of(module)}
    for path, layer in module.named_modules():
        if f"{path}.scales" in expected:
            rows, columns = dense[f"{path}.weight"]
            groups = (rows, columns // layer.group_size)
            expected[f"{path}.weight"] = (rows, columns * layer.bits // 32)
            expected |= {f"{path}.scales": groups, f"{path}.biases": groups}
    for own in sorted(expected.keys() | arrays.keys()):
        if own not in arrays:
            yield f"lacks {own!r}, which mflux's {name} has"
        elif own not in expected:
            yield f"has {own!r}, which mflux's {name} does not take"
        elif arrays[own].shape != expected[own]:
            yield f"{own!r} has the shape {arrays[own].shape}, mflux's {name} has {expected[own]}"


def _check_component(family: Family, base: Path, name: str, module: nn.Module) -> None:
    """Raise where a component in ``base`` is not what mflux would load into ``module``; no weights are read."""
    component = component_of(family.definition, name)
    place = base / component.hf_subdir
    try:
        loaded = WeightLoader.load_single_local(component, base)
    except (ModelConfigError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise CalibError(f"{place}: {reason_of(error)}") from None

    def own(arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        return {path: array for path, array in arrays.items() if not any(part in path for part in UNUSED)}

    arrays = own(dict(tree_flatten(loaded.components[name])))
    for fault in faults_of(family, name, module, arrays, loaded.meta_data.quantization_level):
        if not any(part in fault for part in UNUSED):
            raise CalibError(f"{place}: {fault}; is it the right model's?")


def _files_of(family: Family, base: Path) -> Iterator[Path]:
    """Files of ``base`` that mflux reads, less those of the transformer, by their place in it; weights are whole."""
    definition = family.definition
    for component in definition.get_components():
        if component.name != TRANSFORMER and not any((base / component.hf_subdir).glob(f"*{_SUFFIX}")):
            raise ConfigError(f"--base {base}: has no {component.hf_subdir}/*{_SUFFIX}; is it the right model's?")
    for tokenizer in definition.get_tokenizers():
        if not (base / tokenizer.hf_subdir).is_dir():
            raise ConfigError(f"--base {base}: has no {tokenizer.hf_subdir}/; copy it from the model's repository")
    wanted = [*definition.get_download_patterns()]
    wanted += [pattern for tokenizer in definition.get_tokenizers() for pattern in tokenizer.download_patterns or ()]
    replaced = f"{component_of(definition, TRANSFORMER).hf_subdir}/"
    for name in sorted(_names_in(base, wanted)):
        if name.startswith(replaced):
            continue
        if (base / name).is_symlink() and not (base / name).exists():
            raise CalibError(f"{base / name}: is a link to nothing; download the model again")
        if name.endswith(_SUFFIX):
            read_header(base / name)
        yield Path(name)


def _names_in(base: Path, patterns: Sequence[str]) -> Iterator[str]:
    """Files in ``base`` that fit one of ``patterns``, as the hub's client understands them, hidden ones left out."""
    tops = {top for pattern in patterns for top in base.glob(pattern.partition("/")[0])}
    for path in (path for top in tops for path in ([top, *top.rglob("*")])):
        parts = path.relative_to(base).parts
        if not (path.is_file() or path.is_symlink()) or path.is_dir() or any(part.startswith(".") for part in parts):
            continue
        name = "/".join(parts)
        if any(fnmatch(name, pattern) for pattern in patterns):
            yield name


def _can_link(path: Path) -> bool:
    """Whether a file is one of weights in the hub's cache, which is never written to again."""
    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return path.suffix == _SUFFIX and path.resolve().is_relative_to(cache)


def _link_or_copy(path: Path, source: Path, advance: Callable[[int], object]) -> None:
    if _can_link(source):
        try:
            path.hardlink_to(source.resolve())
        except OSError:  # on another file system, or one without such links
            copy_file(path, source, advance)
    else:
        copy_file(path, source, advance)
