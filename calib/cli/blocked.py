"""Hydra's list of functions that no configuration may name (shells, eval, pickle …), applied to calib's options."""

from collections.abc import Mapping
from typing import Any

from calib.base.errors import ConfigError, reason_of
from calib.base.targets import current_place
from calib.stages.options import SKELETON

from hydra.errors import InstantiationException
from hydra.utils import instantiate


def check_targets(config: Mapping[str, Any]) -> None:
    """Raise where an option of ``config`` names a function that Hydra refuses; nothing is called.

    The environment variable HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE allows some, as Hydra's messages say. Early versions
    of Hydra 1.3 have no list.
    """
    for group, node in config.items():
        for key in ("_target_", SKELETON):
            target = node.get(key) if isinstance(node, Mapping) else None
            if not isinstance(target, str):
                continue
            try:
                instantiate({"_target_": current_place(target), "_partial_": True})
            except InstantiationException as error:
                if error.__cause__ is None:  # else it is not there, which the option's own check says better
                    raise ConfigError.bad_value(f"{group}.{key}", target, reason_of(error)) from None
            except SystemExit:  # of its module, likewise
                continue
