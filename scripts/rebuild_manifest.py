"""``calib rebuild-manifest``: restores a lost manifest from a dataset's files."""

from calib.__main__ import main

if __name__ == "__main__":
    main("rebuild-manifest")
