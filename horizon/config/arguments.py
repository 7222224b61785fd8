"""The parser of commands that take no settings: a mistake is a ConfigError of one line, as everywhere else."""

from __future__ import annotations

import argparse
from typing import NoReturn

from horizon.errors import ConfigError


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but for what happens when arguments are wrong."""

    def error(self, message: str) -> NoReturn:
        """Raise a ConfigError that says where help is."""
        raise ConfigError(f"{message} ({self.prog} --help)")
