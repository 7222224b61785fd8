"""Reports as runs leave them: of one that finished, of one that failed under way, and of a sweep with failures."""

import json

import pytest

from horizon.config.compose import compose
from horizon.errors import NonFiniteError
from horizon.report.facts import RunFacts, Status
from horizon.trainer import Trainer
from tests.report.pages import charts, check_page
from tests.test_cli import horizon  # noqa: F401
from tests.test_train import TINY

QUICK = [*TINY, "train.steps=6", "model.self_check=false", "train.save=false"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(8):
        (folder / f"{number}.txt").write_text("the quick brown <b>fox</b> jumps over the lazy dog. " * 12)
    return folder


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    """(folder, summary) of a run that finished."""
    out = tmp_path_factory.mktemp("run")
    return out, Trainer(compose([*QUICK, f"data.path={texts}", "trace=true", "checkpoint.save_every=3"]), out).run()


def test_a_run_ends_with_its_report(trained):
    out, summary = trained
    page, content = (out / "report.html").read_text(), json.loads((out / "report.json").read_text())
    check_page(page)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    loss = next(chart for chart in content["charts"] if chart["title"] == "Loss")["series"]
    assert loss[0]["y"] == [row["loss"] for row in rows] and loss[0]["x"] == list(range(1, 7))
    assert loss[1]["y"] == [summary.validation_loss_before, summary.validation_loss_after]
    assert content["numbers"]["tokens_per_s"] == pytest.approx(summary.tokens_per_s)
    assert content["numbers"]["clipped_share"] == summary.clipped_steps / 6
    assert content["split"]["step_ms"] == summary.split.step_ms
    assert content["samples"]["after"] == summary.sample_after and content["samples"]["prompt"]
    assert [row["step"] for row in content["checkpoints"]] == [3, 6]
    assert "data:image/png;base64," in page and len(charts(page)) == len(content["charts"]) >= 9


def test_what_was_planned_is_what_the_run_was_told(trained, capsys):
    out, _ = trained
    facts = RunFacts.read(out)
    assert facts.device == "cpu" and facts.predicted.tokens_per_s > 0 and facts.num_parameters > 0
    assert {line.tier for line in facts.planned} == {"host", "device"} == set(facts.limits)
    assert {"weights (bf16)", "checkpoint staging"} <= {line.purpose for line in facts.planned}
    content = json.loads((out / "report.json").read_text())
    measured = {tier["tier"]: tier["measured_bytes"] for tier in content["memory"]}
    peak = max(json.loads(line)["host_bytes"] for line in (out / "metrics.jsonl").read_text().splitlines())
    assert measured == {"host": peak, "device": None}  # on CPU nothing stands for a device's memory


def test_a_run_that_fails_under_way_has_a_report_with_its_last_good_step(texts, tmp_path):
    trainer = Trainer(compose([*QUICK, f"data.path={texts}", "optim.lr=1e30", "optim.schedule=constant"]), tmp_path)
    with pytest.raises(NonFiniteError):
        trainer.run()
    facts, page = RunFacts.read(tmp_path), (tmp_path / "report.html").read_text()
    assert facts.status is Status.failed and facts.error.startswith("NonFiniteError: ") and facts.traceback is None
    assert trainer.step > 0 and facts.validation_loss_before > 5
    check_page(page)
    assert "This run failed" in page and f"The last good step is {trainer.step} of 6" in page
    assert json.loads((tmp_path / "report.json").read_text())["last_good_step"] == trainer.step


def test_a_sweep_ends_with_the_table_of_its_runs_and_a_page(horizon, texts, tmp_path):  # noqa: F811
    rates = "optim.lr=1e-2,1e30,-1"
    done = horizon("train", "-m", *[key for key in QUICK if "optim.lr" not in key], f"data.path={texts}", rates)
    assert done.returncode == 1
    (sweep,) = tmp_path.glob("multirun/*/*")
    table = done.stdout.partition(f"runs of {sweep.relative_to(tmp_path)}\n")[2].splitlines()
    assert table[0].split()[:3] == ["run", "optim.lr", "ended"]
    assert [line.split()[:3] for line in table[1:4]] == [
        ["0", "0.01", "finished"], ["1", "1e+30", "failed"], ["2", "-1", "failed"],
    ]  # fmt: skip
    assert table[4] == "* lowest validation loss" and "*" in table[1]
    assert table[5].startswith("1 failed: NonFiniteError: ") and table[6].startswith("2 failed: ConfigError: AdamW lr")
    assert table[7] == str((sweep / "comparison.html").relative_to(tmp_path))
    check_page((sweep / "comparison.html").read_text())
    found = json.loads((sweep / "comparison.json").read_text())["runs"]
    summary = json.loads((sweep / "0/summary.json").read_text())
    losses = [summary["validation_loss_after"], None, None]
    assert [run["numbers"]["validation_loss_after"] for run in found] == losses
    check_page((sweep / "2/report.html").read_text())
