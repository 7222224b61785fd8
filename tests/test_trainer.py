"""The trainer with an engine that computes nothing: order of events, rows, ends good and bad."""

import ast
import dataclasses
import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from horizon import trainer as module
from horizon.config.schema import (
    Clip,
    DataConfig,
    DataFormat,
    EvalConfig,
    HorizonConfig,
    LrSchedule,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from horizon.engine import Engine
from horizon.errors import BudgetError, CheckpointError, ConfigError
from horizon.models.sources import ModelSource
from horizon.plan.memory import Limits
from horizon.records import StepSplit, Traffic
from horizon.run_settings import LR_RANDOM, check_settings, with_lr
from horizon.sampling import generate
from horizon.stream.head import TokenScores
from horizon.trainer import Trainer, recorded_steps

SPLIT = StepSplit(
    steps=3, step_ms=10.0, arithmetic_ms=6.0, link_ms=1.0, optimizer_ms=1.0, disk_ms=0.0, data_ms=1.0, launch_ms=1.0,
    hbm_update_ms=0.0, forward_ms=2.0, head_ms=1.0, backward_ms=3.0, host_paced_ms=0.0, update_bytes=5, update_ms=2.0,
    update_threads=1, update_bytes_per_s=2500.0,
    traffic=[Traffic(direction="H2D", what="weights", num_bytes=7, least_bytes=7, busy_ms=1.0)],
)  # fmt: skip


class FakeEngine:
    """Counts what it is asked for; the next token is always the last one plus one."""

    def __init__(self, vocab_size, at_step=lambda step: None, loss_at=lambda step: 3.0 - step / 5):
        self.vocab_size, self.at_step, self.loss_at = vocab_size, at_step, loss_at
        self.lr, self.lrs, self.evaluated, self.closed, self.saved, self.windows = 0.0, [], [], False, None, []
        self.host_bytes, self.device_bytes = 1 << 30, 0
        self.device, self.plan = torch.device("cpu"), SimpleNamespace(
            table=lambda: "the plan", limits=Limits(0, 0), num_bytes=lambda tier: 0, lines=(), activations=(),
            prediction=None, num_parameters=0,
        )  # fmt: skip
        self.recorded, self.trace_files = None, None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def plan_micro_batch(self, batch_size, seq_len, rows=None):
        return 3

    def step(self, batches):
        self.at_step(len(self.lrs) + 1)
        self.lrs.append(self.lr)
        trained = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        rows = [len(batch["input_ids"]) for batch in batches]
        assert rows == [3, 1]
        return SimpleNamespace(
            loss=5.0 - len(self.lrs), grad_norm=0.5, num_tokens=trained, skipped=False, clip_scale=0.5,
            corrected_blocks=2, projected_gradients=(),
        )  # fmt: skip

    @contextmanager
    def trace(self, path, picture):
        first, recording = len(self.lrs) + 1, SimpleNamespace(split=None)
        yield recording
        self.recorded, self.trace_files, recording.split = (first, len(self.lrs)), (path, picture), SPLIT

    def score(self, batches):
        """Rows that each have 10 labels and the step's loss."""
        step, shapes = len(self.lrs), [(len(batch["input_ids"]), 10) for batch in batches]
        self.evaluated.append((step, sum(num_rows for num_rows, _ in shapes)))
        correct = torch.arange(10) < 4
        return [
            TokenScores(
                torch.full(shape, -self.loss_at(step), dtype=torch.double), correct.expand(shape), torch.ones(shape)
            )
            for shape in shapes
        ]

    def generate(self, input_ids, *, max_new_tokens, eos_token_id, **settings):
        """Counts on from the last token."""
        self.windows.append(input_ids.tolist()[0])
        ids = self.windows[-1]
        while len(ids) < input_ids.shape[1] + max_new_tokens and ids[-1] not in (eos_token_id or ()):
            ids = [*ids, (ids[-1] + 1) % self.vocab_size]
        return torch.tensor([ids])

    def save_pretrained(self, folder, tokenizer):
        self.saved = (folder, tokenizer)


def make_config(tmp_path):
    """Settings of a short run on ten small texts."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "abcdefghij":
        (texts / f"{name}.txt").write_text(f"{name * 50}\n" * 8)
    return HorizonConfig(
        model=ModelConfig(config={"model_type": "llama"}),
        data=DataConfig(format=DataFormat.text, path=str(texts), tokenizer="bytes", validation_fraction=0.2),
        optim=OptimConfig(schedule=LrSchedule.linear, warmup_steps=2),
        train=TrainConfig(steps=5, batch_size=4, seq_len=32, sample_tokens=3, sample_prompt="abc"),
        eval=EvalConfig(rows=7),
    )


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the trainer on a fake engine, whose `at_step` may raise; gives the engine and the summary or the error."""

    def run(config, at_step=lambda step: None):
        engine = FakeEngine(257, at_step)
        monkeypatch.setattr(module, "build_engine", lambda *args: engine)
        trainer = Trainer(config, tmp_path / "out")
        try:
            return engine, trainer.run()
        except BaseException as error:
            return engine, error

    return run


def read_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_rows_summary_settings_and_model(config, run, tmp_path, capsys):
    engine, summary = run(config)
    rows = read_rows(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in rows] == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_s", "host_bytes", "device_bytes"} <= set(rows[0])
    assert all(row["num_tokens"] == 4 * 32 for row in rows)  # rows of whole documents, no padding among them
    assert all(0 < row["num_trained_tokens"] < 4 * 32 for row in rows)
    assert all(row["tokens_per_s"] == row["num_tokens"] / row["seconds"] for row in rows)
    assert [row["lr"] for row in rows] == engine.lrs
    assert engine.lrs == pytest.approx([1e-3, 2e-3, 1.4e-3, 0.8e-3, 0.2e-3])  # warm-up of 2, then down to a tenth
    assert engine.evaluated == [(0, 4), (0, 3), (5, 4), (5, 3)]  # a step's rows at a time
    assert (summary.validation_loss_before, summary.validation_loss_after) == (3.0, 2.0)
    assert (summary.steps, summary.num_tokens, summary.loss, summary.sample_after) == (5, 640, 0.0, "def")
    assert json.loads((tmp_path / "out/summary.json").read_text()) == dataclasses.asdict(summary)
    assert OmegaConf.load(tmp_path / "out/config.yaml").optim.lr == LR_RANDOM
    assert engine.saved == (tmp_path / "out/model", engine.saved[1])
    assert engine.closed
    shown = capsys.readouterr()
    for text in ("the plan", "validation loss before training: 3.0000", "abc >>> def", str(tmp_path / "out/model")):
        assert text in shown.out
    assert "step 5/5 loss 0.0000" in shown.err


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(1, (1, 1)), (2, (2, 2)), (3, (3, 3)), (4, (3, 4)), (5, (3, 5)), (900, (3, 5))]
)
def test_the_recorded_steps_are_the_third_to_the_fifth_or_the_last_ones(num_steps, expected):
    assert recorded_steps(num_steps) == expected


@pytest.mark.parametrize("num_steps", [1, 4, 7])
@pytest.mark.parametrize("trace", [False, True])
def test_where_the_time_went_is_recorded_in_every_run_and_a_timeline_written_where_it_is_asked_for(
    config, run, tmp_path, capsys, num_steps, trace
):
    config.train.steps, config.trace = num_steps, trace
    engine, summary = run(config)
    assert engine.recorded == recorded_steps(num_steps)
    assert len(engine.lrs) == num_steps
    path = tmp_path / "out/trace.json"
    assert engine.trace_files == ((path, tmp_path / "out/trace.png") if trace else (None, None))
    assert summary.trace_file == (str(path) if trace else None)
    assert json.loads((tmp_path / "out/summary.json").read_text())["split"] == dataclasses.asdict(SPLIT)
    out = capsys.readouterr().out
    assert "a step of 10 ms, mean of 3 recorded" in out
    assert (f"trace    {path}" in out) is trace


def test_a_trace_without_matplotlib_is_refused_before_anything_is_read(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    config.data.path = "/no/such/texts"
    check_settings(config)
    with pytest.raises(ConfigError, match=r"trace=true draws .* matplotlib, which is not installed"):
        Trainer(dataclasses.replace(config, trace=True), "out")


@pytest.mark.parametrize(
    ("clip", "max_grad_norm", "said", "shown"),
    [
        (Clip.exact, None, "none", ""),
        (Clip.exact, 1.0, "exact", ""),
        (Clip.speculative, 1.0, "speculative", "speculative: 5 steps clipped, 10 updates of blocks corrected"),
        (Clip.lagged, 1.0, "lagged clipping: not exact", "lagged clipping: not exact: 5 steps clipped"),
    ],
)
def test_what_became_of_clipping_is_told(config, run, tmp_path, capsys, clip, max_grad_norm, said, shown):
    config.optim = dataclasses.replace(config.optim, clip=clip, max_grad_norm=max_grad_norm)
    _, summary = run(config)
    assert (summary.clip, summary.clipped_steps, summary.corrected_blocks) == (said, 5, 10)
    assert {(row["clip_scale"], row["corrected_blocks"]) for row in read_rows(tmp_path / "out")} == {(0.5, 2)}
    out, progress = capsys.readouterr()
    assert shown in out
    assert all(("lagged clipping: not exact" in line) is (clip is Clip.lagged) for line in progress.splitlines())


def test_a_way_to_clip_without_a_norm_is_refused_before_data_are_read(config, tmp_path):
    config.optim = dataclasses.replace(config.optim, clip=Clip.speculative, max_grad_norm=None)
    with pytest.raises(ConfigError, match=r"clip=speculative has no norm.*optim\.max_grad_norm.*optim\.clip=exact"):
        Trainer(config, tmp_path / "out")


def test_each_row_is_on_disk_before_the_next_step_begins(config, run, tmp_path):
    on_disk = []
    run(config, at_step=lambda step: on_disk.append(len(read_rows(tmp_path / "out"))))
    assert on_disk == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("failure", [BudgetError("too big"), KeyboardInterrupt(), OSError("disk")], ids=repr)
def test_a_failure_passes_through_after_the_engine_closed_and_the_last_step_was_named(
    config, run, tmp_path, capsys, failure
):
    def fail(step):
        if step == 3:
            raise failure

    engine, error = run(config, at_step=fail)
    assert error is failure
    assert engine.closed and engine.saved is None
    assert [row["step"] for row in read_rows(tmp_path / "out")] == [1, 2]
    assert f"stopped after step 2 of 5; metrics in {tmp_path / 'out/metrics.jsonl'}" in capsys.readouterr().out


def test_what_is_switched_off_is_not_done(config, run, tmp_path):
    config.train = dataclasses.replace(config.train, sample_tokens=0, save=False, micro_batch=None)
    config.eval.rows = 0
    engine, summary = run(config)
    assert (engine.evaluated, engine.windows, engine.saved) == ([], [], None)
    assert (summary.validation_loss_after, summary.sample_after, summary.model_dir) == (None, None, None)


def test_without_a_prompt_the_sample_continues_a_held_out_row(config, run):
    config.train.sample_prompt = None
    engine, _ = run(config)
    assert len(engine.windows[0]) == 32 - 3  # the beginning makes room for the sample
    assert len(set(engine.windows[0])) <= 3  # one letter, line ends, perhaps an end of text


def test_a_sample_stops_at_the_end_of_text_and_keeps_to_the_context():
    engine = FakeEngine(10)
    tokenizer = SimpleNamespace(eos_token_id=8, pad_token_id=None, decode=lambda ids: "".join(map(str, ids)))
    assert generate(engine, tokenizer, [1, 2, 3], 3, max_context=5, seed=0) == "456"
    assert generate(engine, tokenizer, [3], 3, max_context=2, seed=0) == "4"
    assert engine.windows == [[2, 3], [3]]
    assert generate(engine, tokenizer, [6], 9, max_context=16, seed=0) == "78"


def test_a_sample_is_drawn_from_the_likeliest_tokens_and_repeats_with_its_seed():
    tokenizer = SimpleNamespace(eos_token_id=None, pad_token_id=None, decode=list)
    small = {"model_type": "llama", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 4}  # fmt: skip
    with Engine.from_config(small, self_check=False, device="cpu") as engine:
        samples = [generate(engine, tokenizer, [1], 30, max_context=64, seed=seed) for seed in (0, 0, 1)]
        assert samples[0] == samples[1] != samples[2]
        ids = [1, *ast.literal_eval(samples[0])]
        for end in range(1, len(ids)):
            likeliest = engine.next_token_logits({"input_ids": torch.tensor([ids[:end]])})[0].topk(20).indices
            assert ids[end] in likeliest.tolist()


def test_the_learning_rate_suits_the_weights_unless_it_is_given(tmp_path):
    trained, random = (ModelSource(tmp_path, has_weights=flag) for flag in (True, False))
    rates = [with_lr(HorizonConfig(), source).optim.lr for source in (trained, random, None)]
    assert rates == [1e-5, 2e-3, 2e-3]
    assert with_lr(HorizonConfig(optim=OptimConfig(lr=0.5)), trained).optim.lr == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": TrainConfig(steps=0)}, "train.steps=0 must be at least 1"),
        ({"train": TrainConfig(batch_size=0)}, "train.batch_size=0"),
        ({"train": TrainConfig(micro_batch=0)}, "train.micro_batch=0"),
        ({"eval": EvalConfig(rows=-1)}, "eval.rows=-1 must be at least 0"),
        ({"train": TrainConfig(sample_tokens=-1)}, "train.sample_tokens=-1"),
        ({"optim": OptimConfig(name="sgd")}, "optim.name='sgd' is unknown; expected adamw or mezo"),
        ({"model": ModelConfig()}, "no model: set model.path"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(config, change, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(dataclasses.replace(config, **change))


def test_a_missing_model_folder_is_refused_before_data_are_read(config, run):
    config.model = ModelConfig(path="/no/such/folder")
    config.data.path = "/no/such/texts"
    _, error = run(config)
    assert isinstance(error, CheckpointError)
