"""Early stopping with the real engine: a run that was killed and resumed ends where the whole one did."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from horizon.checkpoint.folder import list_checkpoints
from horizon.checkpoint.manifest import read_manifest
from horizon.config.compose import compose
from horizon.data import load_run_data
from horizon.errors import ConfigError
from horizon.trainer import Trainer
from tests.runs import killed_after, rows_of, saves_that_end_at_once, write_texts
from tests.test_docs import METRICS, table
from tests.test_resuming import TINY

ROOT = Path(__file__).parents[1]
EVALUATED = [
    *(word for word in TINY if not word.startswith(("eval.rows", "checkpoint.save_every", "optim.lr"))),
    "eval.rows=6",
    "eval.every=2",
    "eval.patience=3",
    "eval.min_delta=0.05",
    "data.validation_fraction=0.3",
    "checkpoint.save_every=3",
    "optim.schedule=constant",
    "optim.lr=3e-2",
    "train.steps=60",
]


@pytest.fixture(scope="module", autouse=True)
def saves_end_at_once():
    with saves_that_end_at_once():
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def settings(texts):
    return lambda *more: compose([*EVALUATED, f"data.path={texts}", *more])


def evaluations(folder):
    """Without the times."""
    rows = rows_of(folder, "evaluations.jsonl")
    return [{key: value for key, value in row.items() if key not in ("seconds", "time")} for row in rows]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """(folder, summary) of a run that nothing but its own patience stopped."""
    out = tmp_path_factory.mktemp("whole")
    return out, Trainer(settings(), out).run()


def test_it_ends_early_cleanly_and_says_so(whole, capsys):
    out, summary = whole
    rows = evaluations(out)
    assert 6 < summary.steps < 60 and summary.steps % 2 == 0
    assert [row["step"] for row in rows] == list(range(0, summary.steps + 1, 2))
    best = min(row["loss"] for row in rows[:-3])
    assert all(row["loss"] >= best - 0.05 for row in rows[-3:])
    assert rows[-1]["loss"] == summary.validation_loss_after and rows[0]["loss"] == summary.validation_loss_before
    assert "(eval.patience=3)" in summary.stopped_early
    assert list_checkpoints(out / "checkpoints")[-1][0] == summary.steps  # as at the end of any run
    assert json.loads((out / "summary.json").read_text())["stopped_early"] == summary.stopped_early


@pytest.mark.parametrize("file", ["metrics.jsonl", "evaluations.jsonl", "checkpoints.jsonl"])
def test_every_key_that_is_written_stands_in_the_table_of_metrics_and_the_reverse(whole, file):
    out, _ = whole
    lines = (out / file).read_text().splitlines()
    assert lines and all(list(json.loads(line)) == list(table(METRICS, f"## {file}")) for line in lines)


@pytest.mark.parametrize("back", [2, 5])
def test_a_run_that_was_killed_goes_on_counting(settings, whole, tmp_path, back):
    out, summary = whole
    with killed_after(summary.steps - back):
        Trainer(settings(), tmp_path).run()
    resumed = Trainer(settings("resume=auto"), tmp_path).run()
    assert (resumed.steps, resumed.stopped_early) == (summary.steps, summary.stopped_early)
    assert evaluations(tmp_path) == evaluations(out)


def test_a_run_that_had_stopped_has_nothing_to_do_until_it_may_be_more_patient(settings, whole, tmp_path):
    out, summary = whole
    again = Trainer(settings("resume=auto"), out).run()
    assert (again.steps, again.stopped_early, again.split) == (summary.steps, summary.stopped_early, None)
    with pytest.raises(ConfigError, match=r"step-\d+ had stopped early: none of the last 3"):
        Trainer(settings(f"resume={out}"), tmp_path / "other").run()
    more = settings(f"resume={out}", "eval.patience=9", f"train.steps={summary.steps + 2}")
    assert Trainer(more, tmp_path / "another").run().steps == summary.steps + 2


def test_a_checkpoints_own_evaluation_is_written_but_not_counted(settings, whole, tmp_path):
    out, summary = whole
    kept = Trainer(settings("checkpoint.keep_best=true", "checkpoint.keep=1"), tmp_path).run()
    assert (kept.steps, kept.stopped_early) == (summary.steps, summary.stopped_early)
    rows = evaluations(tmp_path)
    assert [row for row in rows if row["step"] % 2 == 0] == evaluations(out)
    assert {row["step"] for row in rows} > {3, 9}
    saved = {
        int(f.name[-8:]): read_manifest(f).run["validation_loss"] for _, f in list_checkpoints(tmp_path / "checkpoints")
    }
    losses = {row["step"]: row["loss"] for row in rows}
    assert all(losses[step] == loss for step, loss in saved.items())
    assert min(loss for step, loss in losses.items() if step and step % 3 == 0) == min(saved.values())


def test_rows_of_several_sources_are_told_apart(settings, tmp_path, monkeypatch):
    def load(*args):
        data = load_run_data(*args)
        rows, (source,) = data.validation, data.validation.sources
        named = tuple(dataclasses.replace(source, name=name) for name in ("even", "odd"))
        rows = dataclasses.replace(rows, sources=named, source=np.arange(len(rows)) % 2)
        return dataclasses.replace(data, validation=rows)

    monkeypatch.setattr("horizon.trainer.load_run_data", load)
    Trainer(settings("train.steps=2", "eval.patience=null", "eval.min_delta=0"), tmp_path).run()
    for row in evaluations(tmp_path):
        parts = row["sources"]
        assert list(parts) == ["even", "odd"] and [part["num_rows"] for part in parts.values()] == [3, 3]
        for key in ("loss", "accuracy"):
            mean = sum(part[key] * part["num_tokens"] for part in parts.values()) / row["num_tokens"]
            assert row[key] == pytest.approx(mean)
        assert parts["even"]["loss"] != parts["odd"]["loss"]


def test_the_command_that_a_stopped_run_prints_goes_on(texts, tmp_path, monkeypatch, capsys):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    more = [
        f"data.path={texts}",
        "hydra.run.dir=my run",
        "train.steps=100000",
        "eval.patience=null",
        "eval.min_delta=0",
    ]

    command = [sys.executable, "-m", "horizon", "train", *EVALUATED, *more]
    first = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list_checkpoints(tmp_path / "my run/checkpoints"):
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    shown = first.communicate(timeout=60)[0]
    (line,) = (line for line in shown.splitlines() if line.startswith("go on from step-"))
    where, _, command = line.partition(": ")
    step = int(where.removeprefix("go on from step-"))
    words = shlex.split(command)
    assert words[:2] == ["horizon", "train"] and words[-2:] == ["hydra.run.dir=my run", "resume=auto"]
    monkeypatch.chdir(tmp_path)
    settings = compose([*(word for word in words[2:] if not word.startswith("hydra.")), f"train.steps={step + 1}"])
    Trainer(settings, Path("my run")).run()
    told = capsys.readouterr().err
    assert [row["step"] for row in rows_of(tmp_path / "my run")] == list(range(1, step + 2))
    assert "\r" not in told and f"step {step + 1}/{step + 1} loss" in told
