"""``calib verify``: reads a whole dataset and says whether it is sound."""

import sys

from calib.cli.main import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])
