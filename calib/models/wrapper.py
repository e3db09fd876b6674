"""A module that stands in another's place for a while."""

from typing import Any

from mlx import nn


class Wrapper(nn.Module):
    """Stands in the place of ``inner``; all attributes but its own are those of ``inner``."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self["inner"] = inner

    def __getattr__(self, key: str) -> Any:
        return super().__getattr__(key) if key in self else getattr(self["inner"], key)

    def __setattr__(self, key: str, value: Any) -> None:
        # FLUX's unified blocks set mlp.fc2.bias in every forward: it must reach the layer itself.
        if "inner" in self and holds(self["inner"], key):
            setattr(self["inner"], key, value)
        else:
            super().__setattr__(key, value)


def holds(module: nn.Module, key: str) -> bool:
    """Whether ``module``, or what it stands for, has a parameter or module ``key``."""
    return key in module or ("inner" in module and holds(module["inner"], key))
