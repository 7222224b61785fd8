"""What a run keeps of itself, however it ends."""

import json
from types import SimpleNamespace

import pytest
import torch

from horizon.errors import BudgetError
from horizon.plan.memory import Limits, Line, MemoryPlan
from horizon.report.facts import RunFacts, Status
from horizon.report.record import RunRecord, command_line, keeps_record, note_failure
from horizon.units import GIB
from tests.report.folders import SPLIT, row, write_run

PLAN = MemoryPlan(3, 1000, (Line("host", "weights", GIB), Line("nvme", "padding", 0)), Limits(2 * GIB, GIB),
                  activations=(Line("device", "hidden states", 7),))  # fmt: skip
ENGINE = SimpleNamespace(plan=PLAN, device=torch.device("cpu"))


def test_a_run_that_is_killed_has_said_how_it_began(tmp_path):
    with RunRecord(tmp_path) as record:
        record.began(ENGINE, 5, 2.5, "sample", "prompt")
        facts = RunFacts.read(tmp_path)
        assert facts.status is Status.running and facts.ended is None
    assert facts.planned == [Line("host", "weights", GIB), Line("device", "hidden states", 7)]
    assert facts.limits == {"host": 2 * GIB, "device": GIB}
    assert (facts.first_step, facts.num_parameters, facts.device) == (5, 1000, "cpu")
    assert (facts.validation_loss_before, facts.sample_before, facts.prompt) == (2.5, "sample", "prompt")


@pytest.mark.parametrize(
    ("error", "status", "told", "has_traceback"),
    [
        (None, Status.finished, None, False),
        (BudgetError("too little"), Status.failed, "BudgetError: too little", False),
        (ZeroDivisionError("deep"), Status.failed, "ZeroDivisionError: deep", True),
        (KeyboardInterrupt(), Status.interrupted, None, False),
    ],
)
def test_how_a_run_ended_is_kept_with_a_report(tmp_path, capsys, error, status, told, has_traceback):
    def end():
        with RunRecord(tmp_path / "new") as record:
            record.recorded(SPLIT)
            if error is not None:
                raise error

    if error is None:
        end()
    else:
        with pytest.raises(type(error)) as raised:
            end()
        assert raised.value is error
    facts = RunFacts.read(tmp_path / "new")
    assert (facts.status, facts.error, facts.split) == (status, told, SPLIT)
    assert ("in end" in (facts.traceback or "")) is has_traceback
    assert facts.environment.seconds == facts.ended - facts.started >= 0
    assert capsys.readouterr().out == f"report   {tmp_path / 'new' / 'report.html'}\n"
    assert json.loads((tmp_path / "new/report.json").read_text())["status"] == status


def test_a_report_that_cannot_be_written_changes_nothing_about_the_run(tmp_path, caplog, capsys):
    write_run(tmp_path, [row(1)])
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(BudgetError, match="the cause"), RunRecord(tmp_path):
        raise BudgetError("the cause")
    with RunRecord(tmp_path):
        pass
    assert "the report of" in caplog.text and "could not be written" in caplog.text
    assert capsys.readouterr().out.count("report ") == 1 and RunFacts.read(tmp_path).status is Status.finished


def test_without_the_libraries_a_run_says_how_to_get_its_report(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr("horizon.report.page.find_spec", lambda name: None)
    with caplog.at_level("INFO"), RunRecord(tmp_path):
        pass
    assert f"pip install 'horizon[report]'; then horizon report {tmp_path}" in caplog.text
    assert not (tmp_path / "report.html").exists() and RunFacts.read(tmp_path).status is Status.finished


def test_a_run_that_was_refused_before_it_began_has_a_record_but_no_other_run_loses_its_own(tmp_path):
    note_failure(tmp_path / "new", BudgetError("no"))
    assert RunFacts.read(tmp_path / "new").error == "BudgetError: no"
    with RunRecord(tmp_path / "old"):
        pass
    note_failure(tmp_path / "old", BudgetError("no"))
    assert RunFacts.read(tmp_path / "old").status is Status.finished


def test_a_method_that_keeps_a_record_has_the_record_open_around_it(tmp_path):
    class Work:
        record = RunRecord(tmp_path)

        @keeps_record
        def run(self):
            """Says it."""
            self.record.recorded(SPLIT)
            return 7

    assert (Work().run(), Work.run.__doc__, RunFacts.read(tmp_path).split) == (7, "Says it.", SPLIT)


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        (["/usr/bin/python3", "-m", "horizon", "train", "seed=1"], ["horizon", "train", "seed=1"]),
        (["/venv/bin/python", "/venv/bin/horizon", "train"], ["horizon", "train"]),
        (["/venv/bin/python", "my/script.py", "a"], ["python", "my/script.py", "a"]),
        (["python"], ["python"]),
    ],
)
def test_the_command_is_what_was_typed(arguments, typed):
    assert command_line(arguments) == typed
