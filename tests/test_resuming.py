"""`horizon train` with checkpoints: a run that was stopped, however that was, and resumed is the run that was not."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import horizon
from horizon.checkpoint.folder import FolderLock, list_checkpoints
from horizon.checkpoint.manifest import read_manifest
from horizon.checkpoint.reader import Checkpoint
from horizon.cli import _dispatch
from horizon.config.compose import compose
from horizon.errors import CheckpointError, ConfigError, HorizonError
from horizon.interrupts import Interrupts
from horizon.run_checkpoints import RunCheckpoints
from horizon.trainer import Trainer
from tests.checkpoint.engines import LLAMA
from tests.runs import killed_after, rows_of, saves_that_end_at_once, write_texts

ROOT = Path(__file__).parents[1]
TINY = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
    "model.self_check=false",
    "data=text",
    "data.tokenizer=bytes",
    "train.steps=12",
    "train.batch_size=5",
    "train.micro_batch=2",
    "train.seq_len=32",
    "eval.rows=0",
    "train.sample_tokens=0",
    "train.save=false",
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
    "device=cpu",
    "checkpoint.save_every=3",
    "checkpoint.keep=null",
]
SAME = ("step", "epoch", "loss", "lr", "grad_norm", "num_tokens", "num_trained_tokens", "skipped", "clip_scale")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def settings(texts):
    return lambda *more: compose([*TINY, f"data.path={texts}", *more])


def numbers(folder):
    return [[row[key] for key in SAME] for row in rows_of(folder)]


def arrays_of(folder, step):
    checkpoint = Checkpoint(folder / f"checkpoints/step-{step:08d}")
    return {(s.name, s.kind): checkpoint.read(s.name, s.kind) for s in checkpoint.manifest.arrays}


def same_arrays(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module", autouse=True)
def patience():
    with saves_that_end_at_once() as impatient:
        yield impatient


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The folder of a run that nothing stopped; the data are gone through more than once."""
    out = tmp_path_factory.mktemp("whole")
    Trainer(settings(), out).run()
    assert rows_of(out)[-1]["epoch"] > 0
    return out


@pytest.mark.parametrize("stop", [1, 3, 8, 11])
def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(settings, whole, tmp_path, stop):
    with killed_after(stop):
        Trainer(settings(), tmp_path).run()
    assert [row["step"] for row in rows_of(tmp_path)] == [*range(1, stop + 1)]
    summary = Trainer(settings("resume=auto"), tmp_path).run()
    assert numbers(tmp_path) == numbers(whole)
    assert same_arrays(arrays_of(tmp_path, 12), arrays_of(whole, 12))
    saved = stop // 3 * 3
    assert summary.resumed_from == (str(tmp_path / f"checkpoints/step-{saved:08d}") if saved else None)
    assert (summary.steps, summary.num_tokens) == (12, sum(row["num_tokens"] for row in rows_of(whole)))
    assert json.loads((tmp_path / "summary.json").read_text()) == dataclasses.asdict(summary)


@pytest.mark.parametrize(
    "changed",
    [["train.micro_batch=5"], ["optim.moments=int8"], ["memory.hbm_blocks=2"], ["checkpoint.staging=128KiB"]],
    ids=str,
)
def test_it_may_go_on_with_other_means(settings, whole, tmp_path, changed):
    with killed_after(7):
        Trainer(settings(), tmp_path).run()
    Trainer(settings("resume=auto", *changed), tmp_path).run()
    losses, expected = ([row["loss"] for row in rows_of(folder)] for folder in (tmp_path, whole))
    exact = changed[0].startswith(("memory", "checkpoint"))
    assert losses == (expected if exact else pytest.approx(expected, rel=1e-2))


def test_packed_or_not_and_with_every_moment_format(settings, tmp_path):
    for number, changed in enumerate((["data.packing=false"], ["optim.moments=int8", "optim.max_grad_norm=null"])):
        one, other = tmp_path / f"{number}-whole", tmp_path / f"{number}-stopped"
        Trainer(settings(*changed), one).run()
        with killed_after(8):
            Trainer(settings(*changed), other).run()
        Trainer(settings(*changed, "resume=auto"), other).run()
        assert numbers(one) == numbers(other)
        assert same_arrays(arrays_of(one, 12), arrays_of(other, 12))


def test_a_run_in_another_folder_begins_where_the_checkpoint_is(settings, whole, tmp_path):
    for name, resume in (("a", whole / "checkpoints/step-00000009"), ("b", whole)):
        summary = Trainer(settings(f"resume={resume}", "train.steps=14"), tmp_path / name).run()
        first = 9 if name == "a" else 12
        assert [row["step"] for row in rows_of(tmp_path / name)] == [*range(first + 1, 15)]
        assert summary.resumed_from == str(whole / f"checkpoints/step-{first:08d}")
    with pytest.raises(ConfigError, match=r"train\.steps=12, but .*step-00000012 is at 12"):
        Trainer(settings(f"resume={whole}"), tmp_path / "c").run()


def test_a_finished_run_that_is_resumed_has_nothing_left_to_do(settings, tmp_path):
    first = Trainer(settings("train.steps=3", "train.save=true"), tmp_path).run()
    again = Trainer(settings("train.steps=3", "train.save=true", "resume=auto"), tmp_path).run()
    assert (again.steps, again.loss, again.split) == (3, first.loss, None)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]


def test_resume_auto_starts_anew_where_there_is_nothing(settings, whole, tmp_path, capsys):
    Trainer(settings("resume=auto", "train.steps=2"), tmp_path).run()
    assert f"resume=auto: no checkpoint in {tmp_path}/checkpoints, starting anew" in capsys.readouterr().out
    assert numbers(tmp_path)[0] == numbers(whole)[0]


def test_weights_alone_begin_a_new_run(settings, whole, tmp_path):
    settings = settings(f"resume={whole}", "resume_weights_only=true", "optim.beta2=0.95", "train.steps=2", "seed=3")
    Trainer(settings, tmp_path).run()
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] < rows_of(whole)[4]["loss"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["train.seq_len=16"], r"train\.seq_len: 32 when it was saved, 16 now"),
        (["seed=1"], r"seed: 0 when it was saved, 1 now"),
        (["data.packing=false"], r"data\.packing: True when it was saved, False now"),
        (["data.max_bytes=1000"], r"data \(hash of all rows\): .*rows: "),
        (["optim.beta1=0.8"], r"optim\.beta1: 0\.9 when it was saved, 0\.8 now"),
        (["model.config.num_attention_heads=2"], r"model\.config\.num_attention_heads: 4 when it was saved, 2 now"),
    ],
)
def test_what_would_make_another_run_of_it_is_refused(settings, whole, tmp_path, changed, message):
    with pytest.raises(CheckpointError, match=message):
        Trainer(settings(f"resume={whole}", "train.steps=13", *changed), tmp_path).run()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (["checkpoint.save_every=often"], ConfigError, r"checkpoint\.save_every='often': expected steps such as 100"),
        (["checkpoint.keep=0"], ConfigError, r"checkpoint\.keep=0 must be at least 1"),
        (["checkpoint.keep_best=true"], ConfigError, r"keep_best=true has no loss to go by: set eval\.rows"),
        (["resume_weights_only=true"], ConfigError, r"resume_weights_only=true with resume=None"),
        (["resume=auto", "resume_weights_only=true"], ConfigError, r"resume_weights_only=true with resume=auto"),
        (["resume=/no/such"], CheckpointError, r"resume=/no/such: no checkpoint there"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_data_are_read(settings, tmp_path, changed, error, message):
    with pytest.raises(error, match=message):
        Trainer(settings(*changed, "data.path=/no/such"), tmp_path / "out").run()


def test_a_folder_of_an_earlier_run_is_not_overwritten(settings, whole):
    with pytest.raises(ConfigError, match=r"step-00000012 is of a later step .*resume=auto"):
        Trainer(settings(), whole).run()
    with pytest.raises(ConfigError, match=r"step-00000012 is of a later step"):
        Trainer(settings(f"resume={whole}/checkpoints/step-00000006"), whole).run()
    assert len(rows_of(whole)) == 12


def test_two_runs_do_not_write_to_one_folder(settings, tmp_path):
    message = r"another run \(process \d+\) writes to"
    with FolderLock(tmp_path / "checkpoints"), pytest.raises(CheckpointError, match=message):
        Trainer(settings(), tmp_path).run()


def test_what_is_kept_and_what_is_told(settings, texts, tmp_path, caplog):
    caplog.set_level("INFO", "horizon")
    more = ["checkpoint.keep=2", "checkpoint.keep_best=true", "eval.rows=4", "data.validation_fraction=0.3"]
    config = settings(*more, "optim.lr=1", "optim.schedule=constant", "optim.warmup_steps=9")  # it gets worse later
    Trainer(config, tmp_path).run()
    folders = [folder for _, folder in list_checkpoints(tmp_path / "checkpoints")]
    told = [json.loads(line) for line in (tmp_path / "checkpoints.jsonl").read_text().splitlines()]
    assert [row["step"] for row in told] == [3, 6, 9, 12]
    assert all(row["seconds"] > 0 and row["num_bytes"] > 0 and row["stall_s"] >= 0 for row in told)
    losses = {int(f.name[-2:]): read_manifest(f).run["validation_loss"] for f in folders}
    assert {9, 12} <= set(losses) and len(losses) <= 3
    assert min(losses, key=losses.get) in (3, 6) or len(losses) == 2
    assert "checkpoint step-00000012: " in caplog.text and "training waited" in caplog.text
    assert (folders[-1] / "tokenizer/tokenizer.json").is_file()


def test_a_save_that_is_due_too_early_follows_later_and_is_warned_about(
    settings, tmp_path, monkeypatch, caplog, patience
):
    from horizon.checkpoint import arrays

    finish, slow = arrays.ArrayWriter.finish, [0.4]
    monkeypatch.setattr(RunCheckpoints, "_begin", patience)
    monkeypatch.setattr(
        arrays.ArrayWriter, "finish", lambda writer: (time.sleep(slow.pop() if slow else 0), finish(writer))
    )
    Trainer(settings("checkpoint.save_every=1", "train.steps=60"), tmp_path).run()
    assert "a checkpoint is due while that of step 1 is still being written" in caplog.text
    steps = [step for step, _ in list_checkpoints(tmp_path / "checkpoints")]
    assert steps[0] == 1 and steps[1] > 2 and steps[-1] == 60


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_the_first_signal_saves_and_stops(settings, whole, tmp_path, monkeypatch, capsys, number):
    step = Trainer._step

    def at_five(trainer, engine, loader):
        if trainer.step == 4:
            os.kill(os.getpid(), number)
        return step(trainer, engine, loader)

    monkeypatch.setattr(Trainer, "_step", at_five)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        Trainer(settings("checkpoint.save_every=1h"), tmp_path).run()
    assert signal.getsignal(number) is before
    shown = capsys.readouterr().out
    assert f"{number.name}: saving step 5" in shown and "resume=auto" in shown
    assert [step for step, _ in list_checkpoints(tmp_path / "checkpoints")] == [5]
    monkeypatch.setattr(Trainer, "_step", step)
    Trainer(settings("resume=auto"), tmp_path).run()
    assert numbers(tmp_path) == numbers(whole)
    assert same_arrays(arrays_of(tmp_path, 12), arrays_of(whole, 12))


def test_the_second_signal_stops_at_once(settings, tmp_path, monkeypatch):
    from horizon.checkpoint import arrays

    step, finish = Trainer._step, arrays.ArrayWriter.finish

    def interrupted(trainer, engine, loader):
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        return step(trainer, engine, loader)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    monkeypatch.setattr(arrays.ArrayWriter, "finish", lambda writer: (time.sleep(1.0), finish(writer)))
    with pytest.raises(KeyboardInterrupt):
        Trainer(settings("checkpoint.save_every=1h"), tmp_path).run()
    assert list_checkpoints(tmp_path / "checkpoints") == []
    assert len(rows_of(tmp_path)) == 5


def test_signals_elsewhere_than_in_the_main_thread_are_left_alone():
    before, found = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: found.append(Interrupts().__enter__().requested))
    thread.start()
    thread.join()
    assert found == [None] and signal.getsignal(signal.SIGTERM) is before


# ---- kill -9


def test_the_command_is_killed_and_goes_on(settings, texts, whole, tmp_path):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    words = [*TINY, f"data.path={texts}", f"hydra.run.dir={tmp_path / 'out'}", "resume=auto"]
    words[words.index("checkpoint.save_every=3")] = "checkpoint.save_every=1"
    command = [sys.executable, "-m", "horizon", "train", *words]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list_checkpoints(tmp_path / "out/checkpoints"):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    summary = Trainer(settings("resume=auto"), tmp_path / "out").run()
    assert summary.resumed_from is not None and summary.steps == 12
    assert numbers(tmp_path / "out") == numbers(whole)
    assert same_arrays(arrays_of(tmp_path / "out", 12), arrays_of(whole, 12))


def test_the_plan_of_a_run_counts_what_checkpoints_are_written_from(texts, capsys):
    words = [word for word in TINY if not word.startswith("checkpoint.save_every")] + [f"data.path={texts}"]
    for every, counted in ((3, True), ("null", False)):
        assert _dispatch(["plan", *words, f"checkpoint.save_every={every}"]) == 0
        assert ("checkpoint staging" in capsys.readouterr().out) is counted


def test_zeroth_order_runs_are_kept_as_their_log(settings, tmp_path):
    with pytest.raises(
        ConfigError, match=r"save_every=3 .* not for optim=mezo, whose replay\.jsonl is a checkpoint of"
    ):
        Trainer(settings("optim=mezo"), tmp_path)
    with horizon.Engine.from_config(LLAMA, optimizer=horizon.ZerothOrder(lr=1e-6), device="cpu") as engine:
        for call in (
            lambda: engine.save_checkpoint(tmp_path / "saved"),
            lambda: engine.restore(tmp_path),
            engine.plan_checkpoints,
        ):
            with pytest.raises(HorizonError, match="a zeroth-order run is kept as its log"):
                call()
