"""A log is a run: its weights again, its continuation, and nothing else's."""

import json

import pytest
import torch

import horizon
from horizon.errors import CheckpointError, HorizonError
from tests.parity.reference import assert_same_tensors, build, plain
from tests.zo.reference import engine_for, masters

SETTINGS = {"lr": 1e-2, "eps": 1e-3, "queries": 2, "weight_decay": 0.1, "momentum": 0.5, "momentum_steps": 3, "seed": 5}


def settings(**changes):
    return horizon.ZerothOrder(**{**SETTINGS, **changes})


def run(engine, first, last):
    for step in range(first, last + 1):
        engine.lr = 1e-2 / step
        engine.step(plain(step))


@pytest.mark.parametrize("master", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_log_rebuilds_the_weights_bit_for_bit(tmp_path, master, tied):
    model, log = build("llama", tie_word_embeddings=tied), tmp_path / "replay.jsonl"
    with engine_for(model, settings(master=master, writeback_every=3)) as engine:
        engine.log_steps(log, "the model")
        run(engine, 1, 7)
        expected = masters(engine)
    with engine_for(model, settings(master=master)) as engine:
        assert engine.replay(log) == 7 == engine.num_steps
        assert_same_tensors(masters(engine), expected)
    assert len(log.read_text().splitlines()) == 8
    assert json.loads(log.read_text().splitlines()[0])["model"] == "the model"


def test_a_run_goes_on_from_its_log_as_if_it_had_never_stopped(tmp_path):
    model, log = build("gpt2"), tmp_path / "replay.jsonl"
    with engine_for(model, settings()) as engine:
        run(engine, 1, 8)
        expected = masters(engine)
    with engine_for(model, settings()) as engine:
        engine.log_steps(log)
        run(engine, 1, 4)
    log.write_text(log.read_text() + '{"step": 5, "seed": 5, "proj')  # cut off while it was written
    with engine_for(model, settings(writeback_every=2)) as engine:
        assert engine.replay(log) == 4
        engine.log_steps(tmp_path / "whole.jsonl")
        run(engine, 5, 8)
        assert_same_tensors(masters(engine), expected)
    with engine_for(model, settings()) as engine:
        assert engine.replay(tmp_path / "whole.jsonl") == 8
        assert_same_tensors(masters(engine), expected)


def test_long_logs_are_applied_in_passes_and_the_same(tmp_path, monkeypatch):
    from horizon.zo import runtime

    model, log = build("llama"), tmp_path / "replay.jsonl"
    with engine_for(model, settings()) as engine:
        engine.log_steps(log)
        run(engine, 1, 5)
        expected = masters(engine)
    monkeypatch.setattr(runtime, "FLUSH_EVERY", 2)
    with engine_for(model, settings()) as engine:
        engine.replay(log)
        assert_same_tensors(masters(engine), expected)


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "replay.jsonl"
    with engine_for(build("llama"), settings()) as engine:
        engine.log_steps(path)
        run(engine, 1, 3)
    return path


def test_another_models_log_is_refused_and_changes_nothing(log):
    other = build("llama")
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    with engine_for(other, settings()) as engine:
        before = masters(engine)
        with pytest.raises(CheckpointError, match="belongs to a run that began with other weights"):
            engine.replay(log)
        assert_same_tensors(masters(engine), before)
        assert engine.num_steps == 0


@pytest.mark.parametrize("change", [{"eps": 2e-3}, {"weight_decay": 0.0}, {"master": "bf16"}, {"seed": 6}], ids=str)
def test_a_log_of_other_settings_is_refused(log, change):
    name = next(iter(change))
    with engine_for(build("llama"), settings(**change)) as engine, pytest.raises(CheckpointError, match=name):
        engine.replay(log)


def test_a_log_of_a_run_with_other_parameters_frozen_is_refused(log):
    with (
        engine_for(build("llama"), settings(), freeze=["lm_head.*"]) as engine,
        pytest.raises(CheckpointError, match="or with other parameters frozen"),
    ):
        engine.replay(log)


def test_a_log_is_replayed_before_any_step_only(log):
    with engine_for(build("llama"), settings()) as engine:
        engine.step(plain(0))
        with pytest.raises(HorizonError, match="after 1 steps"):
            engine.replay(log)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: rows[1:], "is no replay log of format 1"),
        (lambda rows: [], "is no replay log of format 1"),
        (lambda rows: [rows[0].replace("mix32", "mix33"), *rows[1:]], "was written with noise"),
        (lambda rows: [rows[0], rows[2]], "line 2 does not continue the run"),
        (lambda rows: [rows[0], rows[1].replace('"seed": 5', '"seed": 4')], "line 2 does not continue the run"),
        (lambda rows: [rows[0], '{"step": 1}'], "lacks something"),
        (lambda rows: [rows[0], "not JSON"], "line 2 is no JSON"),
        (lambda rows: [rows[0], rows[1].replace('"projected_gradients": [', '"projected_gradients": [1, ')], "line 2"),
    ],
)
def test_a_damaged_log_is_refused(log, edit, message):
    rows = log.read_text().splitlines()
    log.write_text("".join(row + "\n" for row in edit(rows)))
    with engine_for(build("llama"), settings()) as engine, pytest.raises(CheckpointError, match=message):
        engine.replay(log)


def test_a_log_that_is_not_there_is_refused(tmp_path):
    with engine_for(build("llama"), settings()) as engine, pytest.raises(CheckpointError, match="cannot be read"):
        engine.replay(tmp_path / "none.jsonl")


def test_only_zeroth_order_engines_have_logs(tmp_path):
    with horizon.Engine.from_pretrained(build("llama"), device="cpu", self_check=False) as engine:
        for use in (engine.replay, engine.log_steps):
            with pytest.raises(HorizonError, match=r"needs an engine with horizon\.ZerothOrder"):
                use(tmp_path / "replay.jsonl")
