"""FID, KID, precision and recall as torch-fidelity computes them, with its Inception network: nothing of it again here.

What calib adds is how far each can be trusted. torch is imported once it is needed.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

from calib.base.errors import CalibError, ConfigError, first_line
from calib.base.files import checksum, short_hash
from calib.evaluation.features.store import Store, key_of
from calib.evaluation.sets import (
    SUBSET_SIZE,
    SUBSETS,
    SetDistance,
    from_subsets,
    share_by_halves,
    unbiased_by_halves,
)

import numpy as np
from numpy.typing import NDArray

PACKAGE, VERSION = "torch-fidelity", "0.4.0"
#: torch-fidelity's names of the network and of its features: after the last pooling, those of published FID and KID.
NETWORK, LAYER, FEATURES = "inception-v3-compat", "2048", 2048
#: Pictures that the network takes at once. On a CPU another number gives the same features, to the bit.
AT_ONCE = 16
#: Rows of a block of distances, of which precision and recall are made: 40 MB with 10,000 pictures.
ROWS_AT_ONCE = 1000
#: Halves of FID, few, as each takes ten seconds whatever their size; 95% of Student's distribution of their spread.
HALVES, TWO_SIDED = 5, 2.776445
#: torch.load reads nothing but arrays and plain containers while this is set, whatever its caller asks for.
ARRAYS_ALONE, ANYTHING = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"

Pixels = NDArray[np.uint8]


class InceptionFeatures:
    """What torch-fidelity's Inception network sees in pictures of eight bits, (height, width, 3) each."""

    def __init__(self, cache_dir: Path, weights: Path | None, key: str):
        """``weights`` is a file in torch-fidelity's layout, named by ``key``; None: those that it downloads, once.

        Raises:
            CalibError: a package is missing, or the weights are missing or something else.
        """
        _check_installed()
        self._network, used = _loaded(weights, None if weights is None else _content(weights, key), key)
        #: What features depend on besides pictures.
        self.content = short_hash([checksum(used), VERSION, metadata.version("torch"), _device()], digits=16)
        self._store = Store(cache_dir / "features" / f"inception-{self.content}")

    def vectors(self, pictures: Sequence[Pixels]) -> NDArray[np.float32]:
        """Features, (pictures, 2048)."""
        keys = [key_of(picture) for picture in pictures]
        found = self._store.made(dict(zip(keys, pictures, strict=True)), FEATURES, self._extracted)
        return np.stack([found[key] for key in keys])

    def _extracted(self, pictures: Sequence[Pixels]) -> NDArray[np.float32]:
        """Features of pictures, those of one size together."""
        import torch
        from torch.utils.data import Subset
        from torch_fidelity.utils import get_featuresdict_from_dataset

        by_size: dict[tuple[int, ...], list[int]] = {}
        for place, picture in enumerate(pictures):
            by_size.setdefault(picture.shape, []).append(place)
        found = np.empty((len(pictures), FEATURES), np.float32)
        for places in by_size.values():
            tensors = [torch.from_numpy(np.ascontiguousarray(pictures[place].transpose(2, 0, 1))) for place in places]
            given = Subset(tensors, range(len(tensors)))  # as a data set
            own = get_featuresdict_from_dataset(given, self._network, AT_ONCE, _device() == "cuda", True, False)
            found[places] = own[LAYER].numpy()
        return found


def _check_installed() -> None:
    """Raise where torch-fidelity is missing, is of another version, or cannot be imported."""
    if util.find_spec("torch_fidelity") is None:
        raise ConfigError(
            f"fid, kid, precision and recall need a package that is not installed: pip install {PACKAGE}=={VERSION}, "
            "or uv sync --group fid (with torch, gigabytes); kid_effnet and fd_effnet do without (evaluation=effnet)"
        )
    try:
        import torch_fidelity
    except Exception as error:  # torch and torchvision of different builds raise what they like
        again = "install torch and torchvision of one release, as PyTorch's own page pairs them"
        raise ConfigError(f"{PACKAGE} is installed and cannot be imported ({first_line(error)}); {again}") from None
    if (found := torch_fidelity.__version__) != VERSION:  # what another lacks would be found after all is drawn
        install = f"pip install {PACKAGE}=={VERSION}"
        raise ConfigError(f"{PACKAGE} {found} is installed, and figures are by functions of {VERSION}: {install}")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _content(weights: Path, key: str) -> str:
    """The checksum of a file that ``key`` names."""
    try:
        return checksum(weights)
    except OSError as error:
        allowed = f"cannot be read as weights of Inception ({error.strerror})"
        raise ConfigError.bad_value(key, weights, allowed) from None


@cache
def _loaded(weights: Path | None, content: str | None, key: str) -> tuple[Any, Path]:
    """The network, and the file that it has its weights from; ``content``: its checksum, as it may be another later."""
    from torch.hub import get_dir
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torch_fidelity.utils import create_feature_extractor

    used = Path(get_dir(), "checkpoints", URL_INCEPTION_V3.rpartition("/")[2]) if weights is None else weights
    path = None if weights is None else str(weights)
    options = {"cuda": _device() == "cuda", "feature_extractor_weights_path": path, "verbose": False}
    try:
        with _arrays_alone():
            return create_feature_extractor(NETWORK, [LAYER], **options), used
    except Exception as error:  # torch raises what it likes of files that are something else, and of networks
        if weights is None and used.exists():
            raise CalibError(f"{used}: {_why(error)}; remove it, and it is downloaded again") from None
        if weights is None:
            instead = f"name the file, {key}=FILE"
            failed = f"{PACKAGE} cannot download its Inception weights ({first_line(error)})"
            raise CalibError(f"{failed}; fetch {URL_INCEPTION_V3} elsewhere and {instead}") from None
        instead = f"name the file that {PACKAGE} downloads, {URL_INCEPTION_V3}"
        raise ConfigError.bad_value(key, weights, f"{_why(error)}; {instead}") from None


@contextmanager
def _arrays_alone() -> Iterator[None]:
    """Have torch.load refuse pickles of anything but arrays; torch-fidelity asks it to load whatever there is."""
    before = {name: os.environ.pop(name, None) for name in (ARRAYS_ALONE, ANYTHING)}
    os.environ[ARRAYS_ALONE] = "1"
    try:
        with warnings.catch_warnings():  # of files that are then refused, in more than a line
            warnings.simplefilter("ignore")
            yield
    finally:
        del os.environ[ARRAYS_ALONE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _why(error: Exception) -> str:
    """What is wrong with a file of weights, by what torch raised."""
    if "state_dict" in str(error):
        return f"has not the arrays of {PACKAGE}'s Inception network"
    if isinstance(error, OSError | RuntimeError):  # of a container that is damaged
        return f"cannot be read as weights of torch ({first_line(error)})"
    return "is no file of weights, or holds more than arrays, which is not read"


# torch-fidelity's first set is of generated pictures, its second of real ones: here y, and x, the reference.


def fid(x: NDArray[Any], y: NDArray[Any], paired: bool, progress: str = "") -> SetDistance:
    """Fréchet inception distance, with what it would be of infinitely many pictures."""
    return unbiased_by_halves(_fid, x, y, paired, progress, HALVES, TWO_SIDED)


def _fid(x: NDArray[Any], y: NDArray[Any]) -> float:
    import torch
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    generated, real = (fid_features_to_statistics(torch.from_numpy(own)) for own in (y, x))
    return float(fid_statistics_to_metric(generated, real, verbose=False)[KEY_METRIC_FID])


def kid(x: NDArray[Any], y: NDArray[Any], paired: bool, progress: str = "") -> SetDistance:
    """Kernel inception distance over random subsets, and their spread."""
    import torch
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(SUBSET_SIZE, min(len(x), len(y)) // 2)
    options = {"kid_subsets": SUBSETS, "kid_subset_size": size, "verbose": False}
    found = kid_features_to_metric(torch.from_numpy(y), torch.from_numpy(x), **options)
    note = (
        "of pairs of one prompt and seed, which it takes for strangers, it is too low; kid_effnet takes them as pairs"
    )
    mean, spread = found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]
    return from_subsets(mean, spread, size, min(len(x), len(y)), (note,) if paired else ())


def precision(x: NDArray[Any], y: NDArray[Any], paired: bool, progress: str = "") -> SetDistance:
    """The share of ``y`` that lies where ``x`` does (arXiv 1904.06991)."""
    return _share("precision", x, y, paired, progress)


def recall(x: NDArray[Any], y: NDArray[Any], paired: bool, progress: str = "") -> SetDistance:
    """The share of ``x`` that lies where ``y`` does."""
    return _share("recall", x, y, paired, progress)


def _share(name: str, x: NDArray[Any], y: NDArray[Any], paired: bool, progress: str) -> SetDistance:
    import torch
    from torch_fidelity.metric_prc import prc_features_to_metric

    def share(x: NDArray[Any], y: NDArray[Any]) -> float:
        options = {"save_cpu_ram": True, "prc_batch_size": ROWS_AT_ONCE, "verbose": False}
        return float(prc_features_to_metric(torch.from_numpy(y), torch.from_numpy(x), **options)[name])

    return share_by_halves(share, x, y, paired, progress)
