"""The parser of commands that are no stages."""

import argparse
from typing import NoReturn

from calib.base.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a ConfigError for wrong arguments."""

    def __init__(self, command: str, description: str, epilog: str):
        as_written = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=f"calib {command}",
            description=description,
            epilog=epilog,
            formatter_class=as_written,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog.removeprefix('calib ')}: {message}; see {self.prog} --help")
