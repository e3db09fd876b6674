"""What a folder for mflux needs to know of a family of its models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx import nn


@dataclass(frozen=True)
class Family:
    """A family of mflux's models.

    Attributes:
        definition: mflux's of the model's files.
        command: mflux's that draws with such a folder.
        transformer: makes the transformer without weights, of the sizes that a quantized model records of it.
        others: makes each other component without weights, of the sizes that a folder states, by mflux's name for it.
        unused: parts of names of tensors of the others that mflux does not read.
    """

    definition: Any
    command: str
    transformer: Callable[[Mapping[str, Any]], nn.Module]
    others: Mapping[str, Callable[[Path], nn.Module]]
    unused: tuple[str, ...] = ()
