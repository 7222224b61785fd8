"""The `horizon` command. A failure that has a name ends as one line and exit code 1; any other keeps its traceback."""

from __future__ import annotations

import gc
import io
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from horizon import __version__
from horizon.errors import ConfigError, HorizonError

if TYPE_CHECKING:
    from horizon.config.schema import HorizonConfig

COMMANDS = (
    "train",
    "data",
    "generate",
    "eval",
    "plan",
    "doctor",
    "check",
    "replay",
    "export",
    "import",
    "checkpoint",
    "bench",
    "report",
)
INTERRUPTED, UNREAD = 130, 141  # the shell's codes for a program that Ctrl-C ended, and one whose output nobody reads

USAGE = """\
usage: horizon COMMAND [argument ...]

Train causal language models that host memory owns and the device only borrows.

commands:
  train        train a model: horizon train [flag ...] [key=value ...]; horizon train --help lists the settings
  data         what a run would train on: horizon data preview [key=value ...]
  generate     go on with prompts: horizon generate model.path=FOLDER prompt=TEXT | prompts=FILE [key=value ...]
  eval         loss, accuracy, answers to questions: horizon eval model.path=FOLDER data=text data.path=PATH
  plan         what a run would use, and how fast: horizon plan [machine=FILE] [key=value ...]; allocates nothing
  doctor       look at this machine: horizon doctor; with --measure, measure it for the plan
  replay       rebuild what optim=mezo trained from its log: horizon replay base=FOLDER log=FILE out=FOLDER
  check        compare an architecture, streamed, with plain autograd: horizon check model.path=FOLDER_OR_HUB_ID
  export       a Hugging Face folder from a checkpoint: horizon export CHECKPOINT FOLDER [dtype=bf16]
  import       a checkpoint from a Hugging Face folder: horizon import MODEL_FOLDER CHECKPOINT
  checkpoint   look after checkpoints: horizon checkpoint ls|verify|diff|prune FOLDER ...
  bench        measure every memory tier of this machine: horizon bench tiers [--out DIR] [--quick]
  report       a run's report, or several compared: horizon report RUN [RUN ...] [--out FILE]; horizon report compare
               A.json B.json: two measurements of bench

flags:
  -h, --help     print this and exit
  --version      print the version and exit
"""

REPLAY_KEYS = {"base", "log", "out", "device", "dtype", "trust_remote_code"}
REPLAY_USAGE = """\
usage: horizon replay base=FOLDER_OR_HUB_ID log=FILE out=FOLDER [key=value ...]

Rebuild the weights of an optim=mezo run, bit for bit, from those that it began with and its replay.jsonl.

  base                the model that the run began with
  log                 the run's replay.jsonl
  out                 folder for the rebuilt model
  device              auto (default) | cpu | cuda | cuda:1
  dtype               of the tensors written: float32 (default) | bfloat16 | float16
  trust_remote_code   true: run Python code that comes with the model
"""


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a sample may hold what the terminal's encoding lacks
    try:
        code = _dispatch(sys.argv[1:])
        sys.stdout.flush()
    except HorizonError as error:
        _print_error(error)
        code = 1
    except KeyboardInterrupt:
        print("horizon: interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        code = UNREAD
    sys.exit(code)


def _reader_is_gone() -> bool:
    """Whether whoever read our output (`horizon plan | head`) has ended; what is left of it is then dropped."""
    poll, output = select.poll(), sys.stdout.fileno()
    poll.register(output, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


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
        case ["data", *rest]:
            from horizon.commands import data

            return data.run(rest)
        case ["generate", *rest]:
            from horizon.commands import generate

            return generate.run(rest)
        case ["eval", *rest]:
            from horizon.commands import eval as evaluation

            return evaluation.run(rest)
        case ["plan", *rest]:
            gc.disable()  # for seconds, most of which are imports: looking for garbage would take a fifth of them
            from horizon.commands import plan

            return plan.run(rest)
        case ["doctor", *rest]:
            from horizon.commands import doctor

            return doctor.run(rest)
        case ["check", *rest]:
            return _check(rest)
        case ["export" | "import" | "checkpoint" as command, *rest]:
            return _look_after_checkpoints(command, rest)
        case ["replay", *rest]:
            return _replay(rest)
        case ["bench", *rest]:
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as for training, whose steps it times
            from horizon.commands import bench

            return bench.run(rest)
        case ["report", *rest]:
            from horizon.commands import report

            return report.run(rest)
        case ["-sc" | "--shell-completion", *rest]:
            return _complete(rest)
    raise ConfigError(f"{arguments[0]!r} is no command; expected {', '.join(COMMANDS)} (horizon --help)")


def _train(arguments: list[str]) -> int:
    """Run once, or every run of a sweep: one that fails is told at once, the others still run, and all are compared."""
    # OpenMP's threads spin while they wait, and beside any other busy process that makes CPU training 7 times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is first imported
    from horizon.config.compose import run_with_hydra

    failures: list[HorizonError] = []

    def report(error: HorizonError, folder: Path) -> None:
        from horizon.report.record import note_failure

        _print_error(error)
        failures.append(error)
        note_failure(folder, error)

    def task(config: HorizonConfig, output_dir: Path, command: str) -> float | None:
        from horizon.trainer import Trainer

        return Trainer(config, output_dir, command=command).run().validation_loss_after  # what a sweeper may minimise

    run_with_hydra(task, arguments, report, _compare_sweep)
    return 1 if failures else 0


def _compare_sweep(folder: Path) -> None:
    """Print the table of a sweep's runs and write the page; where that fails, the runs are still what they are."""
    from horizon.commands import report

    print(f"\nruns of {folder}", flush=True)
    try:
        report.run([str(folder)])
    except HorizonError as error:
        _print_error(error)


def _check(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: horizon check model.path=FOLDER_OR_HUB_ID | model=GROUP_OPTION [key=value ...]")
        return 0
    from horizon.config.compose import compose

    model = compose(arguments).model
    from horizon.check import check_model  # after a misspelt setting had its chance: this loads transformers

    print(check_model(model))
    return 0


def _look_after_checkpoints(command: str, arguments: list[str]) -> int:
    from horizon.commands import checkpoint

    run, usage = {
        "export": (checkpoint.export_command, checkpoint.EXPORT),
        "import": (checkpoint.import_command, checkpoint.IMPORT),
        "checkpoint": (checkpoint.checkpoint_command, checkpoint.CHECKPOINT),
    }[command]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"usage: {usage}")
        return 0
    return run(arguments)


def _replay(arguments: list[str]) -> int:
    """Steps of a log onto the weights that its run began with; nothing of Hydra's is needed."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(REPLAY_USAGE, end="")
        return 0
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if len(given) < len(arguments) or not given.keys() <= REPLAY_KEYS or not {"base", "log", "out"} <= given.keys():
        raise ConfigError(f"replay {' '.join(arguments)}: expected base=FOLDER log=FILE out=FOLDER [key=value ...]")
    from horizon.replaying import replay

    print(replay(**given))
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
    nothing: Callable[..., None] = lambda *arguments: None  # noqa: E731
    run_with_hydra(nothing, ["-sc", *arguments], nothing, nothing)
    return 0


def _print_error(error: HorizonError) -> None:
    print(f"horizon: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
