"""Entry point of ``calib`` and ``python -m calib``."""

import sys


def main() -> None:
    """Hand over: the doctor must run where importing the rest fails, and a comparison need not wait for it."""
    if sys.argv[1:2] == ["doctor"]:
        from calib import doctor

        sys.exit(doctor.main(sys.argv[2:]))
    if sys.argv[1:2] == ["compare"]:
        from calib import comparing

        sys.exit(comparing.main(sys.argv[2:]))
    try:
        from calib import cli
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
