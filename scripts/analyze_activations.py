"""``calib analyze`` under the name of the script it replaces: the same overrides, the same files."""

from calib.__main__ import main

if __name__ == "__main__":
    main("analyze")
