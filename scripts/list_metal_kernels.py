"""Store the names of MLX's Metal kernels that calib's operations are looked up in, for a new version of MLX.

pip download --no-deps --platform macosx_14_0_arm64 --only-binary :all: mlx-metal==VERSION
unzip mlx_metal-*.whl mlx/lib/mlx.metallib
python scripts/list_metal_kernels.py VERSION mlx/lib/mlx.metallib
"""

import sys
import textwrap
from pathlib import Path

from calib.base.metal import STORED, names_in, shortened


def main(version: str, library: str) -> None:
    names = sorted(shortened(names_in(Path(library))))
    text = textwrap.fill(" ".join(names), 118, break_long_words=False, break_on_hyphens=False)
    STORED.write_text(f"Metal kernels of MLX {version}\n{text}\n", encoding="utf-8")
    print(f"{STORED}: {len(names)} names, {STORED.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
