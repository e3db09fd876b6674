"""Check that this device computes correctly what calib relies on: ``calib doctor --selftest``.

Four kinds of checks: the shipped model draws two pictures, which are compared with stored values; MLX operations that
collection and quantization use are compared with NumPy; collected statistics are compared with float64 ones; and what
a Mac would run is looked up among the kernels of MLX's Metal backend, on any machine.

Devices round differently (TF32 products on NVIDIA, other orders of summation), so bounds on floating-point work are
far above rounding and far below the error of a wrong result. Integer work, extremes and counts must be exact: bound 0.
"""

from collections.abc import Callable, Iterator, Mapping

from calib.base.errors import first_line
from calib.cli import selftest_collection as collection
from calib.cli import selftest_kernels as kernels
from calib.cli import selftest_metal as metal
from calib.cli import selftest_model as model
from calib.cli.selftest_check import Check

GROUPS: Mapping[str, Callable[[], Iterator[Check]]] = {
    "sampling": model.check_sampling,
    "16-bit views": kernels.check_views,
    "order keys": kernels.check_keys,
    "scatter add": kernels.check_scatter,
    "reductions": kernels.check_reductions,
    "quantize": kernels.check_quantize,
    "columns": kernels.check_columns,
    "products": kernels.check_products,
    "quantized products": kernels.check_quantized_products,
    "collection": collection.check_collection,
    "collection, real activations": collection.check_real_activations,
    "Metal kernels": metal.check_metal,
}


def run() -> list[Check]:
    """Run all checks, in order; a group that raises is reported as failed, and the others still run."""
    results: list[Check] = []
    for name, group in GROUPS.items():
        try:
            results.extend(group())
        except Exception as error:  # the report must show which operation the device lacks
            results.append(Check(name, float("inf"), 0.0, f"{type(error).__name__}: {first_line(error)}"))
    return results
