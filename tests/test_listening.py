"""A run with evaluations between its steps, callbacks and an early end; on the engine that computes nothing."""

import dataclasses
import json

import pytest

import horizon
from horizon import trainer as module
from horizon.config.schema import EvalConfig
from horizon.errors import CallbackError, ConfigError
from horizon.records import EvalRow, RunSummary, StepRow
from horizon.trainer import Trainer, recorded_steps
from tests.test_trainer import FakeEngine, make_config, read_rows


class Listener(horizon.Callback):
    """Notes what it hears, and fails when asked to."""

    def __init__(self, fail_at=None):
        self.heard, self.fail_at = [], fail_at

    def hear(self, name, record):
        self.heard.append((name, record))
        if (name, getattr(record, "step", None)) == self.fail_at:
            raise ValueError("no room in the table")

    def on_step(self, row):
        self.hear("step", row)

    def on_eval(self, row):
        self.hear("eval", row)

    def on_checkpoint(self, row):
        self.hear("checkpoint", row)

    def on_end(self, summary):
        self.hear("end", summary)

    def on_failure(self, error):
        self.hear("failure", error)

    @property
    def order(self):
        return [(name, getattr(record, "step", None)) for name, record in self.heard]


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the trainer on a fake engine whose losses are given; gives the engine and the summary or the error."""

    def run(settings, loss_at=lambda step: 3.0 - step / 5, at_step=lambda step: None, **others):
        engine = FakeEngine(257, at_step, loss_at)
        monkeypatch.setattr(module, "build_engine", lambda *args: engine)
        trainer = Trainer(settings, tmp_path / "out", **others)
        try:
            return engine, trainer.run()
        except Exception as error:
            return engine, error

    return run


def with_eval(settings, **changes):
    return dataclasses.replace(settings, eval=EvalConfig(rows=7, **changes))


def evaluations(folder):
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_callbacks_hear_of_everything_in_order_and_of_what_is_written(config, run, tmp_path):
    listener = Listener()
    _, summary = run(with_eval(config, every="2"), callbacks=iter([listener]))
    assert listener.order == [
        ("eval", 0), ("step", 1), ("step", 2), ("eval", 2), ("step", 3), ("step", 4), ("eval", 4), ("step", 5),
        ("eval", 5), ("end", None),
    ]  # fmt: skip
    kinds = {"step": StepRow, "eval": EvalRow, "end": RunSummary}
    assert all(type(record) is kinds[name] for name, record in listener.heard)
    rows = [dataclasses.asdict(record) for name, record in listener.heard if name == "step"]
    assert [(row["step"], row["loss"], row["time"]) for row in rows] == [
        (row["step"], row["loss"], row["time"]) for row in read_rows(tmp_path / "out")
    ]
    assert [dataclasses.asdict(r) for name, r in listener.heard if name == "eval"] == evaluations(tmp_path / "out")
    assert listener.heard[-1][1] == summary and summary.stopped_early is None


def test_a_callback_that_fails_ends_the_run_and_all_hear_of_it(config, run, tmp_path, capsys):
    bad, other = Listener(fail_at=("step", 3)), Listener()
    engine, error = run(config, callbacks=[bad, other])
    assert isinstance(error, CallbackError)
    assert str(error) == "callback Listener.on_step: ValueError: no room in the table"
    assert engine.closed and len(read_rows(tmp_path / "out")) == 3
    assert bad.heard[-1] == other.heard[-1] == ("failure", error)
    assert "stopped after step 3 of 5" in capsys.readouterr().out


def test_a_callback_that_is_none_is_refused_before_anything_is_read(config, tmp_path):
    config.data.path = "/no/such/texts"
    with pytest.raises(ConfigError, match=r"is no horizon\.Callback"):
        Trainer(config, tmp_path / "out", callbacks=[print])


def test_a_step_is_recorded_without_the_evaluation_behind_it(config, run):
    config.train.steps = 8
    for every, expected in (("1", (3, 3)), ("2", (3, 4)), ("100", recorded_steps(8))):
        engine, _ = run(with_eval(config, every=every))
        assert engine.recorded == expected


LOSSES = {0: 3.0, 1: 2.0, 2: 2.5, 3: 1.9, 4: 1.95, 5: 1.95}


@pytest.mark.parametrize(
    ("patience", "min_delta", "last"), [(1, 0.0, 2), (2, 0.0, 5), (2, 0.2, 3), (3, 0.0, 9), (None, 0.0, 9)]
)
def test_a_run_ends_early_when_it_no_longer_gets_better(config, run, tmp_path, capsys, patience, min_delta, last):
    config.train.steps = 9
    settings = with_eval(config, every="1", patience=patience, min_delta=min_delta)
    engine, summary = run(settings, loss_at=lambda step: LOSSES.get(step, 1.8 - step / 100))
    assert summary.steps == len(engine.lrs) == last
    assert [row["step"] for row in evaluations(tmp_path / "out")] == list(range(last + 1))
    assert engine.saved is not None and summary.validation_loss_after == pytest.approx(engine.loss_at(last))
    out = capsys.readouterr().out
    if last < 9:
        assert f"stopped early, at step {last} of 9: none of the last {patience} evaluation" in out
        assert f"(eval.patience={patience})" in summary.stopped_early
    else:
        assert summary.stopped_early is None and "stopped early" not in out


def test_an_evaluation_between_steps_is_told(config, run, capsys):
    run(with_eval(config, every="4"))
    out, err = capsys.readouterr()
    assert "validation loss before training: 3.0000 (perplexity 20.09, accuracy 40.0%)" in out
    assert "validation loss at step 4: 2.2000 (perplexity 9.025, accuracy 40.0%)" in err
    assert "validation loss after training: 2.0000" in out


def test_the_share_of_the_resident_speed_is_that_of_the_predicted_arithmetic(config, run, tmp_path, monkeypatch):
    class Predicting(FakeEngine):
        def __init__(self, *args):
            super().__init__(*args)
            self.plan.prediction = type("Prediction", (), {"arithmetic_s": 0.001})

    monkeypatch.setattr("tests.test_listening.FakeEngine", Predicting)
    run(config)
    assert all(row["resident_share"] == pytest.approx(0.001 / row["seconds"]) for row in read_rows(tmp_path / "out"))


def test_without_a_prediction_there_is_no_share(config, run, tmp_path):
    run(config)
    assert {row["resident_share"] for row in read_rows(tmp_path / "out")} == {None}


def test_a_failure_without_checkpoints_says_so(config, run, tmp_path, capsys):
    def fail(step):
        if step == 3:
            raise OSError("disk")

    run(config, at_step=fail, command="horizon train data=text hydra.run.dir=out")
    out = capsys.readouterr().out
    assert f"stopped after step 2 of 5; metrics in {tmp_path / 'out/metrics.jsonl'}" in out
    assert "no checkpoint is on disk to go on from (checkpoint.save_every=None)" in out
