"""What tests of whole runs share: their data, what they wrote, and how they are stopped."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest

from horizon.run_checkpoints import RunCheckpoints
from horizon.trainer import Trainer


def write_texts(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"the quick brown fox {number} jumps over the lazy dog. " * 5)
    return folder


def rows_of(folder: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


@contextmanager
def killed_after(steps: int):
    """A run inside ends by an error that nothing handles when it has done so many steps."""
    step = Trainer._step

    def stop(trainer, engine, loader):
        if trainer.step == steps:
            raise SystemError("killed")
        return step(trainer, engine, loader)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemError, match="killed"):
        patch.setattr(Trainer, "_step", stop)
        yield


@contextmanager
def saves_that_end_at_once():
    """Steps here take less time than a disk needs to flush a file: each save ends before the next step."""
    begin = RunCheckpoints._begin

    def begin_and_wait(checkpoints, step):
        begin(checkpoints, step)
        checkpoints._save.wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunCheckpoints, "_begin", begin_and_wait)
        yield begin
