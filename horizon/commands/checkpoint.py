"""`horizon export`, `horizon import` and `horizon checkpoint`: what the command line does with checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from horizon.checkpoint.compare import array_differences, manifest_differences
from horizon.checkpoint.convert import export_checkpoint, import_model
from horizon.checkpoint.folder import list_checkpoints
from horizon.checkpoint.manifest import Manifest, read_manifest
from horizon.checkpoint.reader import Checkpoint
from horizon.checkpoint.schedule import best_checkpoint, prune
from horizon.config.schema import MasterFormat
from horizon.errors import CheckpointError, ConfigError
from horizon.run_checkpoints import FOLDER, find_checkpoint
from horizon.units import format_bytes, parse_bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

EXPORT = "horizon export CHECKPOINT FOLDER [dtype=bf16|fp16|fp32] [shard=4GiB]"
IMPORT = "horizon import MODEL_FOLDER CHECKPOINT"
CHECKPOINT = """\
horizon checkpoint ls FOLDER                                what a run's folder holds
       horizon checkpoint verify CHECKPOINT                        read all of it and compare checksums
       horizon checkpoint diff CHECKPOINT CHECKPOINT               settings and arrays that differ; exit code 1 if any
       horizon checkpoint prune FOLDER keep=N [keep_best=true]     remove all but the last N (and the best)"""


def export_command(arguments: list[str]) -> int:
    """A Hugging Face folder from a checkpoint."""
    (source, target), options = _parse(arguments, 2, {"dtype": "bf16", "shard": "4GiB"}, EXPORT)
    if options["dtype"] not in DTYPES:
        raise ConfigError(f"dtype={options['dtype']}: expected {', '.join(DTYPES)}")
    checkpoint = Checkpoint(find_checkpoint(Path(source)))
    export_checkpoint(checkpoint, Path(target), DTYPES[options["dtype"]], parse_bytes(options["shard"], "shard"))
    manifest = checkpoint.manifest
    what = manifest.model_class if manifest.adapter is None else f"adapter of {manifest.model_class}"
    print(f"{target}: {what} of step {manifest.step} in {options['dtype']}")
    return 0


def import_command(arguments: list[str]) -> int:
    """A checkpoint from a Hugging Face folder."""
    (source, target), _ = _parse(arguments, 2, {}, IMPORT)
    manifest = import_model(Path(source), Path(target))
    print(f"{target}: {manifest.model_class}, {format_bytes(manifest.num_bytes)} of fp32 masters, no moments")
    return 0


def checkpoint_command(arguments: list[str]) -> int:
    """One of the commands that look after checkpoints."""
    commands: dict[str, Callable[[list[str]], int]] = {"ls": _ls, "verify": _verify, "diff": _diff, "prune": _prune}
    if not arguments or arguments[0] not in commands:
        raise ConfigError(f"horizon checkpoint takes {', '.join(commands)} (horizon checkpoint --help)")
    return commands[arguments[0]](arguments[1:])


def _ls(arguments: list[str]) -> int:
    (folder,), _ = _parse(arguments, 1, {}, CHECKPOINT)
    found = _checkpoints_in(Path(folder))
    best = best_checkpoint([path for _, path in found])
    for _, path in found:
        try:
            print(f"{path.name}  {describe(read_manifest(path))}{'  best' if path == best else ''}")
        except CheckpointError as error:
            print(f"{path.name}  {error}")
    return 0


def describe(manifest: Manifest) -> str:
    """A checkpoint on one line."""
    loss = manifest.run.get("validation_loss")
    optimizer = manifest.optimizer or {"moments": "no", "master": MasterFormat.split}
    masters = "" if optimizer["master"] == MasterFormat.split else ", bf16 masters"
    parts = [
        f"{format_bytes(manifest.num_bytes):>9}",
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.time)),
        f"{manifest.model_class} at step {manifest.step}, {optimizer['moments']} moments{masters}",
        *([f"{manifest.run['tokens']:,} tokens"] if "tokens" in manifest.run else []),
        *([] if loss is None else [f"validation loss {loss:.4f}"]),
    ]
    return "  ".join(parts)


def _verify(arguments: list[str]) -> int:
    (folder,), _ = _parse(arguments, 1, {}, CHECKPOINT)
    checkpoint, began = Checkpoint(find_checkpoint(Path(folder))), time.perf_counter()
    size = checkpoint.manifest.num_bytes
    bar = tqdm(total=size, desc="reading", unit="B", unit_scale=True, delay=2, disable=None, leave=False)
    with bar:
        checkpoint.verify(bar.update)
    seconds = time.perf_counter() - began
    arrays = f"{len(checkpoint.manifest.arrays)} arrays, {format_bytes(size)}"
    print(f"{checkpoint.folder}: {arrays}, all as they were written ({format_bytes(size / seconds)}/s)")
    return 0


def _diff(arguments: list[str]) -> int:
    folders, _ = _parse(arguments, 2, {}, CHECKPOINT)
    one, other = (Checkpoint(find_checkpoint(Path(folder))) for folder in folders)
    lines = manifest_differences(one.manifest, other.manifest)
    lines += [f"{spec.name} ({spec.kind}): {text}" for spec, text in array_differences(one, other)]
    print("\n".join(lines) if lines else "the same, bit for bit")
    return 1 if lines else 0


def _prune(arguments: list[str]) -> int:
    (folder,), options = _parse(arguments, 1, {"keep": "", "keep_best": "false"}, CHECKPOINT)
    if not options["keep"].isdecimal() or int(options["keep"]) < 1:
        raise ConfigError(f"keep={options['keep']}: expected how many checkpoints are to be kept, at least 1")
    if options["keep_best"] not in ("true", "false"):
        raise ConfigError(f"keep_best={options['keep_best']}: expected true or false")
    found = _checkpoints_in(Path(folder))
    for path in prune(found[0][1].parent, int(options["keep"]), options["keep_best"] == "true"):
        print(f"removed {path}")
    return 0


def _checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    found = list_checkpoints(folder / FOLDER) or list_checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder} has no checkpoints; expected a run's folder, or the checkpoints in it")
    return found


def _parse(
    arguments: list[str], num_folders: int, defaults: dict[str, str], usage: str
) -> tuple[list[str], dict[str, str]]:
    """The folders and the key=value options of a command.

    Raises:
        ConfigError: too few or too many folders, or an option that there is not.
    """
    keys = {argument.partition("=")[0] for argument in arguments if "=" in argument and not Path(argument).exists()}
    options = {key: value for key, _, value in (a.partition("=") for a in arguments) if key in keys}
    folders = [argument for argument in arguments if argument.partition("=")[0] not in keys]
    if unknown := sorted(keys - defaults.keys()):
        expected = ", ".join(defaults) or "no options"
        raise ConfigError(f"{unknown[0]} is no option here; expected {expected}")
    if len(folders) != num_folders:
        raise ConfigError(f"expected {num_folders} folders, got {len(folders)}; usage: {usage.splitlines()[0]}")
    return folders, {**defaults, **options}
