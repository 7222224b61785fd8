"""Saves that fail or are refused: training goes on, and nothing is left behind."""

import errno
import os
import threading
import time
from types import SimpleNamespace

import pytest

from horizon.checkpoint import arrays, folder
from horizon.checkpoint.folder import FolderLock, list_checkpoints, remove_left_overs
from horizon.checkpoint.format import ArraySpec
from horizon.errors import CheckpointError, ConfigError, HorizonError
from tests.checkpoint.engines import LLAMA, build, equal, make_batch, states, train

# ---- saves that fail


@pytest.fixture
def full_disk(monkeypatch):
    """The disk is full from the given array on."""
    open_array = arrays.open_array

    def fail(folder_, spec: ArraySpec, create=False):
        if create and spec.name == "model.layers.1.mlp.up_proj.weight":
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_array(folder_, spec, create)

    monkeypatch.setattr(arrays, "open_array", fail)


def test_a_full_disk_is_told_at_the_next_call_and_training_can_go_on(tmp_path, full_disk):
    with build() as reference:
        expected, final = train(reference, 1, 6), states(reference)
    with build() as engine:
        found = train(engine, 1, 2)
        save = engine.save_checkpoint(tmp_path / "saved")
        while not save.done:
            time.sleep(0.01)
        with pytest.raises(
            CheckpointError, match=r"could not be written, .*up_proj.*No space left.*training can go on"
        ):
            engine.step(make_batch(3))
        found += train(engine, 3, 6)
        assert found == expected
        assert equal(states(engine), final)
        with pytest.raises(CheckpointError, match="No space left"):
            save.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_meets_updates_that_wait_for_room(tmp_path, full_disk):
    with build() as engine:
        engine.plan_checkpoints("64KiB")
        train(engine, 1, 1)
        save = engine.save_checkpoint(tmp_path / "saved")
        with pytest.raises(CheckpointError, match="No space left"):
            for step in range(2, 200):
                engine.step(make_batch(step))
        assert save.done
        train(engine, 2, 3)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_really_is_full(tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=400k tmpfs {small} 2>/dev/null"):
        pytest.skip("mounting is not allowed here")
    try:
        with build() as engine:
            train(engine, 1, 1)
            with pytest.raises(CheckpointError, match=r"a checkpoint needs .* but 400 KiB is free.*checkpoint\.keep"):
                engine.save_checkpoint(small / "saved")
            monkeypatch.setattr(folder, "_SMALL_FILES", -(1 << 30))  # as if another process took the room meanwhile
            save = engine.save_checkpoint(small / "saved")
            with pytest.raises(CheckpointError, match=r"could not be written"):
                save.wait()
            assert list(small.iterdir()) == []
    finally:
        os.system(f"umount {small}")


def test_too_little_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with build() as engine:
        train(engine, 1, 1)
        with pytest.raises(CheckpointError, match=r"needs 16\.3 MiB in .* but 1 MiB is free; make room"):
            engine.save_checkpoint(tmp_path / "saved")
        train(engine, 2, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_never_replaced(tmp_path):
    with build() as engine:
        engine.save_checkpoint(tmp_path / "saved").wait()
        with pytest.raises(CheckpointError, match=r"saved exists already and is not replaced"):
            engine.save_checkpoint(tmp_path / "saved")


def test_what_cannot_be_kept_is_refused_at_once(tmp_path):
    with build() as engine:
        for run in ({"x": object()}, {"x": float("nan")}):
            with pytest.raises(ConfigError, match=r"must be plain JSON values"):
                engine.save_checkpoint(tmp_path / "saved", run=run)


def test_two_processes_do_not_write_the_same_checkpoint(tmp_path):
    first = folder.PartialFolder(tmp_path / "saved", 0)
    with pytest.raises(CheckpointError, match=r"another process is writing .*saved; stop it, or choose another folder"):
        folder.PartialFolder(tmp_path / "saved", 0)
    assert remove_left_overs(tmp_path) == []  # it is not left over
    first.commit()
    assert (tmp_path / "saved").is_dir()


def test_two_runs_do_not_share_a_folder(tmp_path):
    message = rf"another run \(process {os.getpid()}\) writes to"
    with FolderLock(tmp_path), pytest.raises(CheckpointError, match=message):
        FolderLock(tmp_path)
    with FolderLock(tmp_path):
        pass


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path):
    for name in (".step-00000003.partial", ".step-00000001.removed", "step-00000002", "notes", ".hidden"):
        (tmp_path / name / "arrays").mkdir(parents=True)
    (tmp_path / "step-00000002/manifest.json").write_text("{}")
    assert [p.name for p in remove_left_overs(tmp_path)] == [".step-00000001.removed", ".step-00000003.partial"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden", "notes", "step-00000002"]
    assert list_checkpoints(tmp_path) == [(2, tmp_path / "step-00000002")]


def test_an_engine_whose_updates_failed_does_not_save_half_of_them(tmp_path):
    with build() as engine:
        train(engine, 1, 1)
        engine._runtime.fail(HorizonError("an update broke"))
        with pytest.raises(HorizonError, match="an update broke"):
            engine.save_checkpoint(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_no_thread_and_no_memory_is_left(tmp_path):
    with build(LLAMA) as engine:
        train(engine, 1, 1)
        engine.save_checkpoint(tmp_path / "saved")
    assert [t.name for t in threading.enumerate() if t.name.startswith("horizon-")] == []
