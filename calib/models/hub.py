"""Fetch files from the Hugging Face hub and load checkpoints; errors are one clear line."""

import logging
from collections.abc import Callable, Mapping, Sequence

import calib.models.compat  # noqa: F401  (must precede diffusionkit.mlx)
from calib.base.errors import CalibError, first_line
from calib.models.tensors import checked, evaluate, set_weights

import mlx.core as mx
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from mlx import nn


def fetch(repository: str, file: str, key: str | None = None) -> str:
    """Path of a hub file, downloaded once; ``key`` names the setting that takes a local file instead.

    Raises:
        CalibError: the file cannot be downloaded; the message says why and what to do.
    """
    # Its warnings about retries add nothing to the error below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return hf_hub_download(repository, file)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        instead = f"; or give {key}=FILE" if key else ""
        raise CalibError(f"{repository}/{file}: {what_to_do(repository, error)}{instead}") from None


def what_to_do(repository: str, error: Exception) -> str:
    """Why a download failed, and the remedy; narrower error classes come first."""
    page = f"{constants.ENDPOINT}/{repository}"
    if isinstance(error, GatedRepoError):
        return f"its licence was not accepted; accept it on {page}, `hf auth login`, and run this again"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub shows no such repository; where {page} is private: `hf auth login`, and run this again"
    if isinstance(error, LocalEntryNotFoundError):
        if constants.is_offline_mode():
            return f"not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; unset it once to download"
        cause = _cause(error.__cause__ or error)
        return (
            f"not in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} cannot be reached ({cause}); connect "
            "this machine once, or copy the cache of another and set HF_HUB_CACHE"
        )
    if isinstance(error, EntryNotFoundError):
        return f"the repository holds no such file; see {page}"
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the hub refuses access; see {page}, `hf auth login` with a token that may read it, and run this again"
    return f"cannot be downloaded ({_cause(error)}); run this again, or see {page}"


def _cause(error: BaseException) -> str:
    """The first line of an error, cut to a readable length."""
    return first_line(error)[:120]


def renamed(
    mapping: Callable[[dict[str, mx.array]], dict[str, mx.array]], weights: dict[str, mx.array], source: str
) -> dict[str, mx.array]:
    """Rename ``weights`` by one of DiffusionKit's key mappings; raises where a tensor is missing or misshapen."""
    try:
        return mapping(weights)
    except KeyError as error:
        raise CalibError(f"{source}: lacks tensor {error}; is it the right checkpoint?") from None
    except (ValueError, IndexError) as error:
        raise CalibError(f"{source}: holds a tensor of a wrong shape ({_cause(error)})") from None


def load_checked(
    module: nn.Module, weights: Mapping[str, mx.array], dtype: mx.Dtype, source: str, unused: Sequence[str] = ()
) -> None:
    """Load ``weights`` into ``module`` as ``dtype``; names and shapes must match exactly, as in :func:`checked`."""
    set_weights(module, checked(module, weights, source, unused), dtype)
    evaluate(module, source)
