"""FLUX.1-dev as mflux draws it, whose transformer is told a weight of guidance: ``model=flux1_dev``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, cast

from calib.base.values import AtLeast, AtMost
from calib.models.architecture import Architecture
from calib.models.mflux.family import Family
from calib.models.mflux.flux1 import architecture, family
from calib.models.model import DiffusionModel, ModelDtype

import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig

#: A weight that a user may ask for, and mflux's own.
Told = Annotated[float, AtLeast(0), AtMost(1000)]
DEFAULT = 3.5


@dataclass(frozen=True)
class Dev(Family):
    """The family, with a weight of guidance that is an input of the transformer: one forward a step, as without."""

    def skeleton(
        self,
        name: str,
        repository: str,
        checkpoint: str | None = None,
        dtype: ModelDtype = ModelDtype.BFLOAT16,
        shift: float = 1.0,
        image_size: Sequence[int] = (1024, 1024),
        cfg_weight: float = 0.0,
        stream: bool | None = None,
        guidance: Told = DEFAULT,
    ) -> Architecture:
        """Check the parameters of :meth:`load`, and build the transformer without weights."""
        return super().skeleton(name, repository, checkpoint, dtype, shift, image_size, cfg_weight, stream)

    def load(
        self,
        name: str,
        repository: str,
        checkpoint: str | None = None,
        dtype: ModelDtype = ModelDtype.BFLOAT16,
        shift: float = 1.0,
        image_size: Sequence[int] = (1024, 1024),
        stream: bool | None = None,
        guidance: Told = DEFAULT,
    ) -> DiffusionModel:
        """Load the model; see :meth:`Family.load`."""
        # mflux rounds it: by 4 of 3500 to bfloat16, which the embedding's fastest waves tell apart.
        rounded = cast(float, mx.array(1000 * guidance).astype(dtype.mlx).item())
        own = replace(
            self,
            architecture=partial(architecture, self.config, "dev", rounded),
            text_encoders=f"{self.text_encoders} at guidance {guidance:g}",
        )
        return Family.load(own, name, repository, checkpoint, dtype, shift, image_size, stream)


FAMILY = family(Dev, ModelConfig.dev(), "dev", 1000 * DEFAULT)

skeleton, load = FAMILY.skeleton, FAMILY.load
