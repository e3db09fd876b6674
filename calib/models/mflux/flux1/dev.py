"""FLUX.1-dev as mflux draws it, whose transformer is told a weight of guidance: ``model=flux1_dev``."""

from dataclasses import replace
from functools import partial
from typing import cast

from calib.models.mflux.family import Family, Told
from calib.models.mflux.flux1 import architecture, family

import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig

#: mflux's own weight of guidance.
DEFAULT = 3.5


def told(own: Family, guidance: Told, dtype: mx.Dtype) -> Family:
    """The family ``own`` of this weight of guidance."""
    guidance = DEFAULT if guidance is None else guidance
    # mflux rounds it: by 4 of 3500 to bfloat16, which the embedding's fastest waves tell apart.
    rounded = cast(float, mx.array(1000 * guidance).astype(dtype).item())
    return replace(
        own,
        architecture=partial(architecture, own.config, "dev", rounded),
        text_encoders=f"{own.text_encoders} at guidance {guidance:g}",
    )


FAMILY = family(ModelConfig.dev(), "dev", 1000 * DEFAULT, told)

skeleton, load = FAMILY.skeleton, FAMILY.load
