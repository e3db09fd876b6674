"""Entry point of ``calib`` and ``python -m calib``."""

import sys

from calib.base.encoding import ensure_utf8_names


def main(*command: str) -> None:
    """Run the command line of this process, with ``command`` before its arguments."""
    ensure_utf8_names()
    from calib.cli.main import main

    main([*command, *sys.argv[1:]])


if __name__ == "__main__":
    main()
