"""The whole of `horizon train`, with the real engine, on a model that fits a test."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from horizon.config.compose import compose
from horizon.config.schema import Clip, Moments
from horizon.data import load_data
from horizon.errors import CheckpointError
from horizon.trainer import Trainer
from horizon.validation import HeldOut

TINY = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
    "data=text",
    "data.tokenizer=bytes",
    "train.steps=12",
    "train.batch_size=4",
    "train.seq_len=32",
    "eval.rows=6",
    "train.sample_tokens=4",
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
    "device=cpu",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        (folder / f"{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 12)
    return folder


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    """(output folder, config, summary) of one run from random weights."""
    config = compose([*TINY, f"data.path={texts}"])
    out = tmp_path_factory.mktemp("run")
    return out, config, Trainer(config, out).run()


def plain_loss(folder, config):
    """Mean loss over the held-out rows by transformers alone."""
    data = load_data(config.data, seq_len=config.train.seq_len, seed=config.seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for (batch,) in HeldOut.of(data.validation, config.eval.rows, 1, 1).passes:
        targets = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(**batch, use_cache=False).loss) * targets
        count += targets
    return total / count


SIMULATED = ["memory.policy=cxl_aware", "memory.cxl_simulated.size=64MiB", "memory.cxl_simulated.gb_per_s=500"]


def test_a_simulated_tier_is_called_simulated_in_every_output(texts, tmp_path, capsys, caplog):
    wanted = [*SIMULATED, "train.steps=3", "trace=true", "eval.rows=0", "train.save=false"]
    Trainer(compose([*TINY, f"data.path={texts}", *wanted]), tmp_path).run()
    shown = capsys.readouterr()
    assert shown.out.count("the cxl tier is simulated") == shown.out.count("the cxl tier was simulated") == 1
    assert all("[cxl (simulated)]" in line for line in shown.err.splitlines() if line.startswith("step "))
    assert shown.err.count("[cxl (simulated)]") >= 2
    assert all(json.loads(line)["simulated"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert json.loads((tmp_path / "summary.json").read_text())["simulated"] is True
    assert '"horizon, cxl (simulated)"' in (tmp_path / "trace.json").read_text()
    assert "simulated: ordinary memory that updates use at 500 GB/s" in caplog.text


def test_a_run_without_one_does_not_say_so(trained):
    out, _, summary = trained
    assert not summary.simulated
    assert not any(json.loads(line)["simulated"] for line in (out / "metrics.jsonl").read_text().splitlines())


def test_it_learns_and_the_saved_model_has_the_loss_that_was_reported(trained):
    out, config, summary = trained
    assert summary.validation_loss_before == pytest.approx(math.log(257), abs=0.2)
    assert summary.validation_loss_after < summary.validation_loss_before - 1
    assert plain_loss(out / "model", config) == pytest.approx(summary.validation_loss_after, rel=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer.decode(tokenizer.encode("the quick fox")) == "the quick fox"


def test_where_a_steps_time_went_is_told_at_the_end(trained):
    out, config, summary = trained
    split = summary.split
    parts = split.arithmetic_ms, split.link_ms, split.optimizer_ms, split.disk_ms, split.data_ms, split.launch_ms
    assert sum(parts) == pytest.approx(split.step_ms) and split.arithmetic_ms > 0
    assert json.loads((out / "summary.json").read_text())["split"]["update_bytes"] == split.update_bytes > 0
    weights = next(t for t in split.traffic if (t.direction, t.what) == ("H2D", "weights"))
    assert weights.num_bytes == weights.least_bytes > 0
    assert not config.trace and summary.trace_file is None and not (out / "trace.json").exists()


def test_a_trace_is_written_beside_the_metrics(texts, tmp_path):
    quick = ["train.steps=4", "train.sample_tokens=0", "eval.rows=0", "train.save=false"]
    summary = Trainer(compose([*TINY, f"data.path={texts}", *quick, "trace=true"]), tmp_path).run()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["name"] for e in events if e.get("cat") == "step"] == ["recorded step 1", "recorded step 2"]
    assert summary.trace_file == str(tmp_path / "trace.json")
    assert (tmp_path / "trace.png").stat().st_size > 1000


def test_the_metrics_follow_the_run(trained):
    out, _, summary = trained
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] == summary.loss < rows[0]["loss"]
    assert all(row["grad_norm"] > 0 and row["host_bytes"] > 0 and row["tokens_per_s"] > 0 for row in rows)


def test_a_run_goes_on_from_the_folder_another_one_wrote(trained, tmp_path):
    out, config, summary = trained
    data = f"data.path={config.data.path}"
    again = compose([*(key for key in TINY if "model.config" not in key), data, f"model.path={out / 'model'}"])
    again.train.steps = 1
    resumed = Trainer(again, tmp_path).run()
    assert resumed.validation_loss_before == pytest.approx(summary.validation_loss_after, rel=1e-5)


def test_the_same_seed_gives_the_same_run(trained, tmp_path):
    _, config, summary = trained
    assert Trainer(config, tmp_path).run().validation_loss_after == summary.validation_loss_after


def test_moments_in_eight_bits_learn_the_same(trained, tmp_path, capsys):
    _, config, summary = trained
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, moments=Moments.int8))
    found = Trainer(config, tmp_path).run()
    assert "exp_avg, exp_avg_sq (int8, scales)" in capsys.readouterr().out
    assert found.validation_loss_after != summary.validation_loss_after
    assert found.validation_loss_after == pytest.approx(summary.validation_loss_after, abs=0.05)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_other_ways_to_clip_learn_as_well_and_tell_what_they_did(trained, tmp_path):
    out, config, _ = trained
    config = dataclasses.replace(config)
    limit = sorted(row["grad_norm"] for row in rows_of(out))[6]  # some steps are clipped and others are not
    losses = {}
    for clip in Clip:
        config.optim = dataclasses.replace(config.optim, clip=clip, max_grad_norm=limit)
        summary, rows = Trainer(config, tmp_path / clip).run(), rows_of(tmp_path / clip)
        scales = [min(1.0, limit / row["grad_norm"]) for row in rows]
        if clip is Clip.lagged:
            scales = [scales[0], *scales[:-1]]
        assert [row["clip_scale"] for row in rows] == pytest.approx(scales, rel=1e-5)
        assert 0 < summary.clipped_steps < len(rows)
        assert summary.corrected_blocks == sum(row["corrected_blocks"] for row in rows)
        assert json.loads((tmp_path / clip / "summary.json").read_text())["clip"].startswith(clip)
        losses[clip] = summary.validation_loss_after
    assert losses[Clip.speculative] == pytest.approx(losses[Clip.exact], rel=1e-4)
    assert losses[Clip.lagged] == pytest.approx(losses[Clip.exact], rel=0.1)


def test_a_damaged_model_folder_is_a_named_error(trained, tmp_path):
    out, config, _ = trained
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in (out / "model").iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)
    broken = compose([*(key for key in TINY if "model.config" not in key), f"model.path={folder}"])
    broken.data = config.data
    with pytest.raises(CheckpointError):
        Trainer(broken, tmp_path / "out").run()
