"""The type in which mflux computes, which it has as one global value."""

from collections.abc import Iterator
from contextlib import contextmanager

from calib.base.errors import ConfigError
from calib.models.model import ModelDtype

import mlx.core as mx
from mflux.models.common.config.model_config import ModelConfig


def check_dtype(dtype: ModelDtype) -> None:
    """Raise for a type in which mflux's models overflow."""
    if dtype is ModelDtype.FLOAT16:
        raise ConfigError.bad_value("model.dtype", dtype, "must be bfloat16 or float32; float16 overflows")


@contextmanager
def in_precision(dtype: mx.Dtype) -> Iterator[None]:
    """Have mflux build graphs, and load weights, in ``dtype`` for the time of the context."""
    own = ModelConfig.precision
    ModelConfig.precision = dtype
    try:
        yield
    finally:
        ModelConfig.precision = own
