"""``calib rebuild-manifest``: restores a lost manifest from a dataset's files."""

import sys

from calib.cli.main import main

if __name__ == "__main__":
    main(["rebuild-manifest", *sys.argv[1:]])
