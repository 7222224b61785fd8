"""The `horizon` command. A failure that has a name ends as one line and exit code 1; any other keeps its traceback."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from horizon import __version__
from horizon.errors import ConfigError, HorizonError

if TYPE_CHECKING:
    from horizon.config.schema import HorizonConfig

INTERRUPTED = 130  # the shell's code for a program that Ctrl-C ended

COMMANDS = ("train", "check", "bench", "report")
_LISTED = ", ".join(COMMANDS[:-1]) + f" or {COMMANDS[-1]}"

USAGE = """\
usage: horizon COMMAND [argument ...]

Train causal language models that host memory owns and the device only borrows.

commands:
  train   train a model: horizon train [flag ...] [key=value ...]; horizon train --help lists the settings
  check   compare an architecture, streamed, with plain autograd: horizon check model.path=FOLDER_OR_HUB_ID
  bench   measure every memory tier of this machine: horizon bench tiers [--out DIR] [--quick]; horizon bench --help
  report  compare two measurements: horizon report compare A.json B.json [--out FILE]

flags:
  -h, --help     print this and exit
  --version      print the version and exit
"""


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a sample may hold what the terminal's encoding lacks
    try:
        code = _dispatch(sys.argv[1:])
    except HorizonError as error:
        _print_error(error)
        code = 1
    except KeyboardInterrupt:
        print("horizon: interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def _dispatch(arguments: list[str]) -> int:
    match arguments:
        case [] | ["-h" | "--help" | "help", *_]:
            print(USAGE, end="")
            return 0
        case ["--version", *_]:
            print(f"horizon {__version__}")
            return 0
        case ["train", *rest]:
            return _train(rest)
        case ["check", *rest]:
            return _check(rest)
        case ["bench", *rest]:
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as for training, whose steps it times
            from horizon.bench.command import bench

            return bench(rest)
        case ["report", *rest]:
            from horizon.report.command import report

            return report(rest)
        case ["-sc" | "--shell-completion", *rest]:
            return _complete(rest)
    raise ConfigError(f"{arguments[0]!r} is no command; expected {_LISTED} (horizon --help)")


def _train(arguments: list[str]) -> int:
    """Run once, or every run of a sweep: one that fails is reported at once and the others still run."""
    # OpenMP's threads spin while they wait, and beside any other busy process that makes CPU training 7 times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is first imported
    from horizon.config.compose import run_with_hydra

    failures: list[HorizonError] = []

    def report(error: HorizonError) -> None:
        _print_error(error)
        failures.append(error)

    def task(config: HorizonConfig, output_dir: Path) -> float | None:
        from horizon.trainer import Trainer

        return Trainer(config, output_dir).run().validation_loss_after  # what a sweeper may minimise

    run_with_hydra(task, arguments, report)
    return 1 if failures else 0


def _check(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: horizon check model.path=FOLDER_OR_HUB_ID | model=GROUP_OPTION [key=value ...]")
        return 0
    from horizon.config.compose import compose

    model = compose(arguments).model
    from horizon.check import check_model  # after a misspelt setting had its chance: this loads transformers

    print(check_model(model))
    return 0


def _complete(arguments: list[str]) -> int:
    """Answer the shell function that `horizon train -sc install=SHELL` installs.

    It calls `horizon -sc query=SHELL`, without the command, and gives the typed line in COMP_LINE.
    """
    from horizon.config.compose import run_with_hydra

    program, _, typed = os.environ.get("COMP_LINE", "").lstrip().partition(" ")
    command, space, rest = typed.lstrip().partition(" ")
    if any(argument.startswith("query=") for argument in arguments):
        if not space:
            print(" ".join(name for name in COMMANDS if name.startswith(command)))
            return 0
        os.environ["COMP_LINE"] = f"{program} {rest}"
    run_with_hydra(lambda config, output_dir: None, ["-sc", *arguments], _print_error)
    return 0


def _print_error(error: HorizonError) -> None:
    print(f"horizon: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
