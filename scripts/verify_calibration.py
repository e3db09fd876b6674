"""``calib verify``: reads a whole dataset and says whether it is sound."""

from calib.__main__ import main

if __name__ == "__main__":
    main("verify")
