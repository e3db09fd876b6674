"""Entry point of ``calib`` and ``python -m calib``."""

from calib.cli.main import main

if __name__ == "__main__":
    main()
