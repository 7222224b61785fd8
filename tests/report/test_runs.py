import json
import math

import pytest

from horizon.errors import DataError
from horizon.report.facts import RunFacts, Status
from horizon.report.runs import find_runs, format_duration, read_run
from horizon.report.settings import changed, differing, read_settings, show
from tests.report.folders import NAN, checkpoint, facts, row, write_run


def test_facts_read_back_as_they_were(tmp_path):
    for known in (facts(), facts(status="failed", error="E: <x>", split=None, predicted=None, planned=[])):
        known.write(tmp_path)
        assert RunFacts.read(tmp_path) == known
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert RunFacts.read(tmp_path / "none") is None


def test_the_numbers_are_those_of_the_steps(tmp_path):
    rows = [row(1), row(2, skipped=True, loss=NAN), row(3), row(4)]
    run = read_run(write_run(tmp_path / "r", rows, notes=facts(), checkpoints=[checkpoint(2), checkpoint(4, 0.5)]))
    numbers = run.numbers
    assert (numbers["steps"], numbers["tokens"], numbers["seconds"], numbers["tokens_per_s"]) == (4, 400, 2.0, 200.0)
    assert (numbers["loss"], numbers["recent_loss"], numbers["clipped_share"]) == (4.96, 4.96, 0.5)
    assert (numbers["skipped_steps"], numbers["checkpoint_stall_s"]) == (1, 0.75)
    assert (numbers["validation_loss_before"], numbers["validation_loss_after"]) == (5.5, 4.0)
    assert (numbers["host_bytes"], numbers["device_bytes"]) == (rows[3].host_bytes, rows[3].device_bytes)
    assert run.validation == [(0, 5.5), (4, 4.0)] and run.samples == ("once", " xx", " upon a time")
    assert run.last_good.step == 4


def test_on_cpu_no_device_memory_was_measured(tmp_path):
    run = read_run(write_run(tmp_path, [row(1)], notes=facts(device="cpu")))
    assert run.numbers["device_bytes"] is None and run.numbers["host_bytes"] > 0


def test_a_line_that_was_cut_short_ends_the_history(tmp_path):
    folder = write_run(tmp_path, [row(1), row(2)])
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "loss": "\xff')
    assert [one.step for one in read_run(folder).rows] == [1, 2]


def test_a_loss_that_was_not_finite_reads_back_as_nan(tmp_path):
    run = read_run(write_run(tmp_path, [row(1), row(2, loss=NAN, grad_norm=math.inf)], notes=facts(status="failed")))
    assert math.isnan(run.rows[1].loss) and math.isnan(run.rows[1].grad_norm)
    assert run.numbers["loss"] is None and run.last_good.step == 1


def test_of_a_step_that_was_done_twice_the_last_counts(tmp_path):
    run = read_run(write_run(tmp_path, [row(1), row(2), row(3), row(2, loss=1.0), row(3, loss=0.5)]))
    assert [(one.step, one.loss) for one in run.rows] == [(1, 4.99), (2, 1.0), (3, 0.5)]


def test_a_run_that_went_on_from_elsewhere_begins_at_its_first_step(tmp_path):
    run = read_run(write_run(tmp_path, [row(101), row(102)], notes=facts(first_step=100)))
    assert run.validation == [(100, 5.5), (102, 4.0)] and run.numbers["steps"] == 102


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_the_summary_of_an_earlier_run_in_the_folder_says_nothing_of_one_that_did_not_finish(tmp_path, status):
    run = read_run(write_run(tmp_path, [row(1)], notes=facts(status=status), after=4.0))
    assert run.status is Status(status) and run.summary == {}
    assert run.numbers["validation_loss_after"] is None and run.samples[2] is None and run.split is not None


def test_runs_of_earlier_versions_have_no_facts(tmp_path):
    finished = read_run(write_run(tmp_path / "a", [row(1)]))
    assert finished.status is Status.finished and finished.split.step_ms == 100.0
    assert finished.numbers["validation_loss_before"] == 5.5 and finished.samples[1] == " xx"
    assert read_run(write_run(tmp_path / "b", [row(1)], after=None)).status is Status.running


def test_a_run_without_steps_has_no_numbers_of_them(tmp_path):
    numbers = read_run(write_run(tmp_path, [], notes=facts(status="failed"), after=None)).numbers
    assert numbers["steps"] == 0 and numbers["tokens_per_s"] is numbers["loss"] is numbers["host_bytes"] is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", '{"format": 9}', "has format 9"),
        ("run.json", '{"format": 1}', "is not a file that a run of horizon train writes"),
        ("summary.json", "{", "summary.json is damaged"),
        ("config.yaml", "a: [", "config.yaml holds no settings"),
        ("config.yaml", "- a", "config.yaml holds no settings"),
        ("metrics.jsonl", '{"step": 1}\n', "metrics that this version of horizon does not know"),
    ],
)
def test_what_no_run_wrote_is_named(tmp_path, name, content, message):
    write_run(tmp_path, [row(1)])
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_run(tmp_path)


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not the folder of a run: it has no run"):
        read_run(tmp_path)
    with pytest.raises(DataError, match="is neither the folder of a run nor one that has any below it"):
        find_runs(tmp_path)


def test_the_runs_of_a_sweep_are_found_in_natural_order(tmp_path):
    for number in (10, 9, 0):
        write_run(tmp_path / f"{number}", [row(1)])
    (tmp_path / "1" / ".hydra").mkdir(parents=True)  # refused before it began
    (tmp_path / "0" / "model").mkdir()
    assert [path.name for path in find_runs(tmp_path)] == ["0", "1", "9", "10"]
    assert find_runs(tmp_path / "9") == [tmp_path / "9"]


def test_settings_that_are_not_the_defaults_come_with_these(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "model:\n  config: {model_type: llama}\n  path: null\noptim: {lr: 0.001, eps: 1.0e-08, clip: exact}\nold: 1\n"
        "train: {steps: 7, save: false}\nmemory: {rules: [], cxl_simulated: {size: null}}\n"
    )
    assert changed(read_settings(tmp_path)) == [
        ("model.config.model_type", "llama", "-"), ("optim.lr", "0.001", "null"), ("old", "1", "-"),
        ("train.steps", "7", "400"), ("train.save", "false", "true"),
    ]  # fmt: skip


def test_settings_of_a_run_that_never_began_are_hydras(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra/config.yaml").write_text("seed: 3\n")
    assert read_settings(tmp_path) == {"seed": 3}


def test_what_differs_between_runs():
    assert differing([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {}]) == ["b"]
    assert differing([{"a": 1}, {"a": 1, "c": 1}]) == ["c"]
    assert differing([{}, {"a": 1}]) == []
    assert [show(value) for value in (None, True, 1e-05, 0.1, "x", [1])] == ["null", "true", "1e-05", "0.1", "x", "[1]"]


def test_durations_in_words():
    assert [format_duration(s) for s in (0.0, 0.0188, 0.25, 59.0, 61, 3600, 7384)] == [
        "0 s", "18.8 ms", "0.25 s", "59 s", "1 min 01 s", "1 h 00 min", "2 h 03 min",
    ]  # fmt: skip


def test_every_evaluation_is_a_point_of_the_validation_loss(tmp_path):
    folder = write_run(tmp_path, [row(1), row(2)], notes=facts())
    scores = {
        "perplexity": 2.0,
        "accuracy": 0.5,
        "num_tokens": 9,
        "num_rows": 1,
        "sources": {},
        "seconds": 1.0,
        "time": 1.7e9,
    }
    lines = [json.dumps({"step": step, "loss": 5.5 - step, **scores}) for step in (0, 1, 2)]
    (folder / "evaluations.jsonl").write_text("\n".join(lines) + "\n")
    assert read_run(folder).validation == [(0, 5.5), (1, 4.5), (2, 3.5)]
