"""FLUX.1-schnell as mflux draws it: ``model=flux1_schnell``."""

from calib.models.mflux.flux1 import family

from mflux.models.common.config.model_config import ModelConfig

FAMILY = family(ModelConfig.schnell(), "schnell")

skeleton, load = FAMILY.skeleton, FAMILY.load
