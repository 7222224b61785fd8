"""`horizon train optim=mezo`, stopped however that was, and resumed from its log: the run that nothing stopped."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from safetensors.torch import load_file

from horizon.checkpoint.folder import FolderLock
from horizon.config.compose import compose
from horizon.errors import CheckpointError, ConfigError
from horizon.trainer import Trainer
from tests.parity.reference import assert_same_tensors, build
from tests.runs import killed_after, rows_of, write_texts

ROOT = Path(__file__).parents[2]
STEPS = 8
SAME = ("step", "epoch", "loss", "lr", "num_tokens", "num_trained_tokens", "skipped", "projected_gradients")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The settings of a run that goes through its data more than once."""
    folder = tmp_path_factory.mktemp("mezo")
    build("llama", tie_word_embeddings=True, vocab_size=264).save_pretrained(folder / "base")
    return [
        "optim=mezo", "model=hf", f"model.path={folder / 'base'}", "model.self_check=false", "data=text",
        f"data.path={write_texts(folder / 'texts')}", "data.tokenizer=bytes", f"train.steps={STEPS}",
        "train.batch_size=7", "train.micro_batch=3", "train.seq_len=32", "eval.rows=3", "train.sample_tokens=2",
        "optim.lr=1e-3", "optim.schedule=linear", "optim.warmup_steps=2", "optim.weight_decay=0.1", "device=cpu",
        "zo.master=bf16", "zo.queries=2", "zo.writeback_every=3", "zo.momentum=0.5", "zo.momentum_steps=3", "seed=3",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def settings(words):
    return lambda *more: compose([*words, *more])


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The folder of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole")
    Trainer(settings(), out).run()
    assert rows_of(out)[-1]["epoch"] > 0
    return out


def assert_same_run(folder, whole):
    assert [[row[key] for key in SAME] for row in rows_of(folder)] == [[r[key] for key in SAME] for r in rows_of(whole)]
    assert rows_of(folder, "replay.jsonl") == rows_of(whole, "replay.jsonl")
    assert_same_tensors(*(load_file(run / "model/model.safetensors") for run in (folder, whole)))


@pytest.mark.parametrize("stop", [0, 1, 4, STEPS - 1])
def test_a_run_that_was_stopped_goes_on_from_its_log(settings, whole, tmp_path, stop):
    with killed_after(stop):
        Trainer(settings(), tmp_path).run()
    assert [row["step"] for row in rows_of(tmp_path, "replay.jsonl")[1:]] == [*range(1, stop + 1)]
    summary = Trainer(settings("resume=auto"), tmp_path).run()
    assert_same_run(tmp_path, whole)
    expected = json.loads((whole / "summary.json").read_text())
    for key in ("steps", "loss", "validation_loss_before", "validation_loss_after", "sample_before", "sample_after"):
        assert getattr(summary, key) == expected[key], key
    assert summary.resumed_from == str(tmp_path / "replay.jsonl")


def test_wherever_the_files_end_the_run_goes_on(settings, whole, tmp_path):
    """What a kill between or in the midst of two writes leaves: a line of the metrics comes before that of the log."""
    log, metrics = ((whole / name).read_bytes() for name in ("replay.jsonl", "metrics.jsonl"))
    lines, rows = log.splitlines(keepends=True), metrics.splitlines(keepends=True)
    ends = [
        (b"".join(lines[:5]), b"".join(rows[:4]) + rows[4][:20]),  # in a row
        (b"".join(lines[:5]), b"".join(rows[:5])),  # between both
        (b"".join(lines[:5]) + lines[5][:1], b"".join(rows[:5])),  # in a line of the log
        (b"".join(lines[:5]) + lines[5][:-1], b"".join(rows[:5])),
        (lines[0], rows[0]),
    ]
    for number, (log, metrics) in enumerate(ends):
        out = tmp_path / str(number)
        out.mkdir()
        (out / "replay.jsonl").write_bytes(log)
        (out / "metrics.jsonl").write_bytes(metrics)
        Trainer(settings("resume=auto"), out).run()
        assert_same_run(out, whole)


def test_a_skipped_step_has_no_line_but_took_its_rows(settings, tmp_path):
    from horizon.zo.executor import ForwardExecutor

    losses, calls = ForwardExecutor.losses, []

    def broken_third(executor, batches, num_queries, loss_fn):
        calls.append(None)
        return losses(executor, batches, num_queries, loss_fn) * (float("nan") if len(calls) == 3 else 1)

    more = ["train.on_nonfinite=skip", "train.save=true"]
    for name, stop in (("whole", None), ("stopped", 5)):
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ForwardExecutor, "losses", broken_third)
            with nullcontext() if stop is None else killed_after(stop):
                Trainer(settings(*more), tmp_path / name).run()
    Trainer(settings(*more, "resume=auto"), tmp_path / "stopped").run()
    assert [row["skipped"] for row in rows_of(tmp_path / "whole")] == [False, False, True] + [False] * (STEPS - 3)
    assert [row["run"]["step"] for row in rows_of(tmp_path / "whole", "replay.jsonl")] == [
        0,
        1,
        2,
        *range(4, STEPS + 1),
    ]
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("changed", [["zo.writeback_every=1"], ["memory.weight_slots=1"]], ids=str)
def test_a_run_in_a_folder_of_its_own_goes_on_by_other_means(settings, whole, tmp_path, changed):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"".join((whole / "replay.jsonl").read_bytes().splitlines(keepends=True)[:5]))
    Trainer(settings(f"resume={log}", *changed), tmp_path / "out").run()
    assert [row["step"] for row in rows_of(tmp_path / "out")] == [*range(5, STEPS + 1)]
    assert rows_of(tmp_path / "out", "replay.jsonl") == rows_of(whole, "replay.jsonl")
    assert_same_tensors(*(load_file(run / "model/model.safetensors") for run in (tmp_path / "out", whole)))
    assert len(rows_of(tmp_path, "log.jsonl")) == 5


def test_a_finished_run_has_nothing_left_to_do_but_may_take_more_steps(settings, whole, tmp_path):
    config = settings("train.steps=3", "optim.schedule=constant")
    Trainer(config, tmp_path).run()
    before = (tmp_path / "replay.jsonl").read_bytes()
    assert Trainer(settings("train.steps=3", "optim.schedule=constant", "resume=auto"), tmp_path).run().split is None
    assert (tmp_path / "replay.jsonl").read_bytes() == before
    Trainer(settings("train.steps=5", "optim.schedule=constant", "resume=auto"), tmp_path).run()
    assert (tmp_path / "replay.jsonl").read_bytes().startswith(before)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["train.seq_len=16"], r"train\.seq_len: 32 when it was saved, 16 now.*model\.path"),
        (["zo.queries=1"], r"was written with queries=2, the engine has 1"),
        (["seed=4"], r"seed: 3 when it was saved, 4 now"),
        (["zo.momentum_steps=2"], r"momentum_steps=3, the engine has 2"),
        (["model.freeze=[*.mlp.*]"], r"other parameters frozen"),
    ],
)
def test_what_would_make_another_run_of_it_is_refused(settings, whole, tmp_path, changed, message):
    with pytest.raises(CheckpointError, match=message):
        Trainer(settings(f"resume={whole}", "train.steps=9", *changed), tmp_path).run()
    assert not (tmp_path / "replay.jsonl").exists()


def test_settings_that_cannot_work_are_refused_before_data_are_read(settings, whole, tmp_path):
    for changed, error, message in (
        (["resume=/no/such"], CheckpointError, r"resume=/no/such: no replay\.jsonl there"),
        (["checkpoint.keep_best=true"], ConfigError, r"keep_best=True are not for optim=mezo"),
        (
            [f"resume={whole}", "resume_weights_only=true"],
            ConfigError,
            r"resume_weights_only=true is not for optim=mezo",
        ),
    ):
        with pytest.raises(error, match=message):
            Trainer(settings("data.path=/no/such", *changed), tmp_path).run()
    (tmp_path / "script.jsonl").write_text("\n".join(json.dumps({k: v for k, v in row.items() if k != "run"})
                                           for row in rows_of(whole, "replay.jsonl")) + "\n")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"script\.jsonl does not tell the place in its data"):
        Trainer(settings("data.path=/no/such", f"resume={tmp_path / 'script.jsonl'}"), tmp_path).run()


def test_the_log_of_an_earlier_run_is_not_overwritten_nor_that_of_another(settings, whole, tmp_path):
    before = (whole / "replay.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"replay\.jsonl is of an earlier run; set resume=auto"):
        Trainer(settings(), whole).run()
    other = whole.with_name("other.jsonl")
    other.write_bytes(before)
    with pytest.raises(ConfigError, match=r"replay\.jsonl is of an earlier run; set resume=auto"):
        Trainer(settings(f"resume={other}"), whole).run()
    with FolderLock(whole), pytest.raises(CheckpointError, match=r"another run \(process \d+\) writes to"):
        Trainer(settings("resume=auto"), whole).run()
    assert (whole / "replay.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_the_first_signal_ends_the_step_and_says_how_to_go_on(settings, whole, tmp_path, monkeypatch, capsys, number):
    step = Trainer._step

    def at_five(trainer, engine, loader):
        if trainer.step == 4:
            os.kill(os.getpid(), number)
        return step(trainer, engine, loader)

    monkeypatch.setattr(Trainer, "_step", at_five)
    with pytest.raises(KeyboardInterrupt):
        Trainer(settings(), tmp_path).run()
    shown = capsys.readouterr().out
    assert f"{number.name}: step 5 is in {tmp_path}/replay.jsonl" in shown and "resume=auto" in shown
    assert rows_of(tmp_path, "replay.jsonl")[-1]["step"] == 5
    monkeypatch.setattr(Trainer, "_step", step)
    Trainer(settings("resume=auto"), tmp_path).run()
    assert_same_run(tmp_path, whole)


def test_a_run_that_is_killed_at_random_instants_goes_on_each_time(words, tmp_path):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path), "3", *words]
    more = ["train.steps=30", "train.batch_size=2", "train.micro_batch=2", "eval.rows=0", "train.sample_tokens=0"]
    done = subprocess.run([*command, *more], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 kills")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
