"""Files of calib 0.1.0, which were all of DiffusionKit's MMDiTs, and do not say what later ones do."""

from collections.abc import Iterable

from calib.models.mmdit.names import layer_name, network_order


def former_order(names: Iterable[str]) -> list[str]:
    """Layers and blocks in the order of the network."""
    return sorted(names, key=network_order)


def former_name(path: str) -> str:
    """The canonical name of the layer at a module path."""
    return layer_name(path)
