"""``calib generate`` under the name of the script it replaces: the same overrides, the same files."""

import sys

from calib.cli.main import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
