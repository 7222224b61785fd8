"""Several runs side by side, and the command that makes all reports of runs."""

import json
import sys

import pytest

from horizon.commands.report import run as command
from horizon.errors import ConfigError, DataError
from horizon.report.run_comparison import RunComparison
from horizon.report.runs import read_run
from tests.report.folders import facts, row, write_run
from tests.report.pages import charts, check_page


def write(folder, lr, after=4.0, steps=3, status="finished", error=None, **settings):
    rows = [row(step, loss=5.0 - lr * step) for step in range(1, steps + 1)]
    return write_run(folder, rows, {"optim": {"lr": lr}, **settings}, facts(status=status, error=error), after=after)


@pytest.fixture
def sweep(tmp_path):
    """Three runs, of which the last failed."""
    write(tmp_path / "sweep/0", 0.001, 4.5)
    write(tmp_path / "sweep/1", 0.01, 3.5)
    write(tmp_path / "sweep/2", 0.1, None, status="failed", error="NonFiniteError: the loss is\n<b>nan</b>", steps=0)
    return tmp_path / "sweep"


def compared(*folders):
    return RunComparison(tuple(read_run(folder) for folder in folders))


def test_the_table_has_what_differs_and_what_it_came_to(sweep, capsys):
    assert command([str(sweep)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["0", "0.001", "finished", "4.5000", "4.9970", "3", "200"],
        ["1", "0.01", "finished", "3.5000", "*", "4.9700", "3", "200"],
        ["2", "0.1", "failed", "-", "-", "0", "-"],
    ]
    assert lines[0].startswith("run  optim.lr  ended") and lines[4] == "* lowest validation loss"
    assert lines[5] == "2 failed: NonFiniteError: the loss is <b>nan</b>"
    assert lines[6] == str(sweep / "comparison.html")


def test_the_page_and_its_numbers_say_the_same(sweep):
    command([str(sweep)])
    page, content = (sweep / "comparison.html").read_text(), json.loads((sweep / "comparison.json").read_text())
    elements = check_page(page)
    assert [text for tag, text in elements.text if tag == "h1"] == ["3 runs compared"]
    assert "2 failed" in page and "<b>" not in page and "optim.lr=0.01" in page
    assert (content["differing"], content["best"], content["judged_by"]) == (["optim.lr"], "1", "validation_loss_after")
    assert [run["settings"] for run in content["runs"]] == [{"optim.lr": lr} for lr in (0.001, 0.01, 0.1)]
    assert [run["numbers"] for run in content["runs"]] == [read_run(sweep / name).numbers for name in "012"]
    assert content["runs"][2]["error"].startswith("NonFiniteError")
    assert len(charts(page)) == len(content["charts"]) == 5


def test_the_curves_are_those_of_the_runs(sweep):
    data = {chart.title: chart.as_json() for chart in compared(sweep / "0", sweep / "1", sweep / "2").charts()}
    by_setting = data["Validation loss by optim.lr"]["series"]
    assert by_setting == [{"label": "", "x": [0.001, 0.01], "y": [4.5, 3.5]}]  # the one that failed has none
    assert data["Training loss"]["series"] == [
        {"label": f"optim.lr={lr}", "x": [1, 2, 3], "y": [5.0 - lr * step for step in (1, 2, 3)]}
        for lr in (0.001, 0.01)
    ]
    assert data["Throughput"]["series"][0]["y"] == [201.0, 202.0, 203.0]


def test_runs_of_different_folders_are_named_by_what_they_do_not_share(tmp_path):
    first, second = write(tmp_path / "a/x/run", 0.1), write(tmp_path / "b/y", 0.1)
    same = compared(first, second)
    assert same.names == ["a/x/run", "b/y"] == same.labels and same.differing == []
    assert compared(first).names == ["run"]


def test_many_settings_are_too_much_for_a_legend(tmp_path):
    folders = [write(tmp_path / name, lr, seed=lr, device=name, trace=lr) for name, lr in (("a", 1), ("b", 2))]
    comparison = compared(*folders)
    assert comparison.differing == ["optim.lr", "seed", "device", "trace"] and comparison.labels == ["a", "b"]
    assert not any(" by " in chart.title for chart in comparison.charts())


def test_without_validation_the_last_losses_judge(tmp_path):
    comparison = compared(write(tmp_path / "a", 0.1, None), write(tmp_path / "b", 0.2, None))
    assert comparison.judged_by == "recent_loss" and comparison.best == 1


def test_more_runs_than_colors_are_told_apart_by_dashes(tmp_path):
    folders = [write(tmp_path / f"{i}", 0.001 * (i + 1)) for i in range(10)]
    (loss,) = [chart for chart in compared(*folders).charts() if chart.title == "Training loss"]
    assert len({(line.color % 8, line.style) for line in loss.series}) == 10


def test_one_run_has_its_report_rebuilt(sweep, tmp_path, capsys):
    assert command([str(sweep / "0")]) == 0
    assert capsys.readouterr().out == f"{sweep / '0' / 'report.html'}\n"
    check_page((sweep / "0/report.html").read_text())
    assert command([str(sweep / "0"), "--out", str(tmp_path / "elsewhere.html")]) == 0
    assert json.loads((tmp_path / "elsewhere.json").read_text())["numbers"]["validation_loss_after"] == 4.5


def test_several_runs_are_a_table_and_with_out_a_page(sweep, tmp_path, capsys):
    assert command([str(sweep / "1"), str(sweep / "0")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["run", "1", "0", "*"]
    assert not list(sweep.glob("*.html"))
    assert command([str(sweep / "1"), str(sweep / "0"), "--out", str(tmp_path / "c.html")]) == 0
    check_page((tmp_path / "c.html").read_text())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([], ConfigError, r"required: RUN \(horizon report --help\)"),
        (["none"], DataError, "none is neither the folder of a run"),
        (["{sweep}", "--out", "c.md"], ConfigError, r"--out=c\.md: expected a name that ends in \.html"),
        (["{sweep}", "--out", "/proc/none/c.html"], ConfigError, "cannot be written"),
    ],
)
def test_wrong_arguments_are_one_line(sweep, arguments, error, message):
    with pytest.raises(error, match=message):
        command([argument.format(sweep=sweep) for argument in arguments])


def test_the_table_needs_no_library_that_the_page_needs(sweep, monkeypatch, capsys):
    monkeypatch.setattr("horizon.report.page.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ConfigError, match=r"pip install 'horizon\[report\]'"):
        command([str(sweep)])
    assert "* lowest validation loss" in capsys.readouterr().out
