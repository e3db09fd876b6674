"""Store what ``calib doctor --selftest`` compares with: values of two pictures that the shipped model draws.

Run it on a CPU (float32 throughout) after the weights have changed::

    python scripts/make_selftest.py
"""

import calib.models.emoji
from calib.cli.selftest_model import REFERENCE, drawn_values

import mlx.core as mx
import numpy as np


def main() -> None:
    mx.set_default_device(mx.Device(mx.cpu))
    model = calib.models.emoji.load()
    np.savez(REFERENCE, fingerprint=np.array(model.fingerprint), **drawn_values(model))
    print(f"{REFERENCE}: {REFERENCE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
