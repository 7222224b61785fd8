"""The real trackers, read back: each has every number of every row at its step, in the run's own folder."""

import dataclasses
import json
import math
import struct
import sys
import time
from types import SimpleNamespace

import pytest

from horizon.config.schema import HorizonConfig, TrackerName
from horizon.errors import ConfigError
from horizon.report import trackers
from horizon.report.callbacks import Callbacks
from horizon.report.trackers import numbers_of, open_trackers, require_trackers
from tests.report.rows import CHECKPOINT, EVAL, STEP, SUMMARY

ROWS = [
    STEP,
    dataclasses.replace(STEP, step=2, loss=2.25, grad_norm=math.nan, projected_gradients=[0.5, -3.0]),
    EVAL,
    dataclasses.replace(STEP, step=3, loss=2.0, skipped=True),
    CHECKPOINT,  # of step 1: told of after step 3
]


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No settings of the user's; a home without keys."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "NETRC", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def expected(rows):
    """{name: [(step, value), ...]} of all numbers."""
    groups = {"StepRow": "train", "EvalRow": "eval", "CheckpointRow": "checkpoint"}
    found = {}
    for row in rows:
        for name, value in numbers_of(groups[type(row).__name__], row).items():
            found.setdefault(name, []).append((row.step, value))
    return found


def track(name, folder, rows=ROWS, done=0, error=None):
    folder.mkdir(exist_ok=True)
    listeners = open_trackers(HorizonConfig(trackers=[name], seed=7), folder, done)
    callbacks = Callbacks(listeners)
    for row in rows:
        callbacks.tell(row)
    callbacks.tell(SUMMARY) if error is None else callbacks.tell_failure(error)
    return listeners


def test_the_numbers_of_a_row_are_named_by_group_and_field():
    found = numbers_of("eval", EVAL)
    assert found["eval/loss"] == 2.0 and found["eval/sources/code/accuracy"] == 0.5
    assert not {"eval/step", "eval/time"} & set(found)
    found = numbers_of("train", ROWS[1])
    assert (found["train/projected_gradients/1"], found["train/skipped"]) == (-3.0, 0.0)
    assert "train/grad_norm" not in found  # not a number
    assert "checkpoint/folder" not in numbers_of("checkpoint", CHECKPOINT)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    track(TrackerName.tensorboard, tmp_path / "run")
    assert read_events(tmp_path / "run") == expected(ROWS)
    track(TrackerName.tensorboard, tmp_path / "run", [dataclasses.replace(STEP, step=2, loss=9.0)], done=1)
    again = read_events(tmp_path / "run")
    assert again["train/loss"] == [(1, 2.5), (2, 9.0)]  # what the run that was killed did after step 1 is void


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    assert any(
        '"seed": 7' in item.tensor_proto.string_val[0].decode() for item in events.Tensors("settings/text_summary")
    )
    return {
        tag: [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.mark.parametrize("error", [None, OSError("disk")], ids=["finished", "failed"])
def test_wandb_offline(tmp_path, error):
    pytest.importorskip("wandb")
    track(TrackerName.wandb, tmp_path / "run", error=error)
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    records = wait_for_wandb(file)
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    found = {}
    for row in history:
        for name, value in row.items():
            if "/" in name:
                found.setdefault(name, []).append((row["step"], value))
    assert found == expected(ROWS)
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert run.project == "horizon" and any(item.key == "seed" and item.value_json == "7" for item in run.config.update)
    assert json.loads((tmp_path / "run/trackers.json").read_text()) == {"wandb": run.run_id}
    (ended,) = (record.exit for record in records if record.WhichOneof("record_type") == "exit")
    assert ended.exit_code == (0 if error is None else 1)
    if error is None:
        track(TrackerName.wandb, tmp_path / "run", ROWS[3:4], done=2)  # the same run to W&B
        files = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
        assert {file.name for file in files} == {f"run-{run.run_id}.wandb"}


def wait_for_wandb(path):
    """All records, when W&B's own process has written the last one."""
    deadline = time.monotonic() + 60
    while True:
        records = list(read_wandb(path))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline
        time.sleep(0.05)


def read_wandb(path):
    """The records of a file: a header of 7 bytes, then blocks of 32 KiB of pieces (checksum 4, length 2, kind 1)."""
    from wandb.proto import wandb_internal_pb2

    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4) and at <= len(content):  # whole, or the last piece, and written to its end
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()], ids=["finished", "failed"])
def test_mlflow_in_a_database_of_the_runs_own(tmp_path, error):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient

    folder = tmp_path / "run"
    track(TrackerName.mlflow, folder, error=error)
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("horizon").experiment_id])
    found = {
        name: [(item.step, item.value) for item in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    assert found == expected(ROWS)
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED" if error is None else "FAILED")
    assert json.loads(run.data.tags["settings"])["seed"] == 7
    if error is None:
        track(TrackerName.mlflow, folder, [dataclasses.replace(STEP, step=4, loss=1.0)], done=3)
        assert client.get_metric_history(run.info.run_id, "train/loss")[-1].step == 4
        assert len(client.search_runs([run.info.experiment_id])) == 1


def test_wandb_is_offline_unless_the_user_logged_in(tmp_path, monkeypatch):
    from horizon.report.trackers import _is_logged_in

    assert not _is_logged_in()
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    (tmp_path / "home/.netrc").chmod(0o600)
    assert _is_logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not _is_logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert _is_logged_in()


def test_a_tracker_that_cannot_begin_is_named_and_the_others_are_closed(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    closed = []
    one = SimpleNamespace(close=lambda failed: closed.append(failed))
    monkeypatch.setitem(trackers.OPEN, TrackerName.tensorboard, lambda *args: one)
    monkeypatch.setitem(trackers.OPEN, TrackerName.mlflow, lambda *args: 1 / 0)
    with pytest.raises(ConfigError, match=r"^trackers=mlflow cannot begin: ZeroDivisionError: division by zero$"):
        open_trackers(HorizonConfig(trackers=[TrackerName.tensorboard, TrackerName.mlflow]), tmp_path, 0)
    assert closed == [True]


def test_a_tracker_that_cannot_be_used_is_refused_with_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"trackers=wandb needs the package wandb.*pip install '\.\[wandb\]'"):
        require_trackers(["wandb"])
    with pytest.raises(ConfigError, match=r"trackers='tensorbord': expected one of tensorboard, wandb, mlflow"):
        require_trackers(["tensorbord"])
    with pytest.raises(ConfigError, match=r"trackers=\[tensorboard,tensorboard\] names one twice"):
        require_trackers(["tensorboard", "tensorboard"])
