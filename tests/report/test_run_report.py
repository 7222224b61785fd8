"""The page and the JSON file of one run: what they say is what the run's folder holds."""

import dataclasses
import json
import math

import pytest

from horizon.plan.memory import Line
from horizon.report.curves import MOST_POINTS
from horizon.report.run_charts import short_rate
from horizon.report.run_report import write_report
from horizon.report.runs import read_run
from horizon.units import GIB
from tests.report.folders import NAN, SPLIT, checkpoint, facts, row, write_run
from tests.report.pages import charts, check_page

SETTINGS = {"optim": {"lr": 1e-3, "max_grad_norm": 1.0}, "train": {"steps": 40}, "model": {"path": "hub/my-model"}}
PNG = b"\x89PNG\r\n\x1a\n"


def report(folder, rows=(), settings=SETTINGS, **run):
    """(page, JSON) of such a run's folder."""
    write_run(folder, rows, settings, **run)
    write_report(read_run(folder), folder / "report.html")
    text = (folder / "report.json").read_text()
    return (folder / "report.html").read_text(), json.loads(text, parse_constant=lambda name: pytest.fail(name))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, page, JSON) of a run in which nothing is missing."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    folder.mkdir()
    (folder / "trace.png").write_bytes(PNG)
    rows = [row(step) for step in range(1, 41)]
    return folder, *report(folder, rows, notes=facts(), checkpoints=[checkpoint(20), checkpoint(40, 0.75)])


def drawn(content, title, label=""):
    """Steps and values of a series of a chart."""
    (chart,) = [chart for chart in content["charts"] if chart["title"] == title]
    (line,) = [line for line in chart["series"] if line["label"] == label]
    return line["x"], line["y"]


def test_the_curves_are_the_lines_of_metrics_jsonl(finished):
    folder, _, content = finished
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for title, label, field in (
        ("Loss", "training", "loss"), ("Learning rate", "", "lr"), ("Gradient norm", "norm", "grad_norm"),
        ("Throughput", "measured", "tokens_per_s"),
    ):  # fmt: skip
        assert drawn(content, title, label) == ([one["step"] for one in rows], [one[field] for one in rows])
    assert drawn(content, "Host memory in use", "measured")[1] == [one["host_bytes"] / GIB for one in rows]


def test_what_was_planned_and_evaluated_is_drawn_beside_it(finished):
    _, _, content = finished
    assert drawn(content, "Loss", "validation") == ([0, 40], [5.5, 4.0])
    assert content["validation"] == [{"step": 0, "loss": 5.5}, {"step": 40, "loss": 4.0}]
    assert drawn(content, "Gradient norm", "clipped to 1") == ([], [1.0])
    assert drawn(content, "Throughput", "planned")[1] == [pytest.approx(100 / 0.075)]
    assert drawn(content, "Host memory in use", "planned peak")[1] == [3.0]


def test_the_share_of_clipped_steps_is_of_the_ten_around_each(finished):
    steps, shares = drawn(finished[2], "Clipped steps")
    assert len(steps) == 40 and shares[20] == 50.0
    assert shares[0] == pytest.approx(100 * 3 / 5)  # steps 1 to 5 are there, of which 1, 3 and 5 were


def test_a_steps_time_and_memory_are_those_that_were_planned_and_measured(finished):
    _, page, content = finished
    (split,) = [chart for chart in content["charts"] if chart["title"] == "A step's time"]
    assert split["names"] == ["measured", "planned"]
    assert {bar["label"]: bar["values"] for bar in split["bars"]} == {
        "arithmetic": [70.0, 60.0], "waiting for link": [20.0, 10.0], "waiting for optimizer": [5.0, 0.0],
        "waiting for data": [3.0, 0.0], "waiting for launches": [2.0, 5.0],
    }  # fmt: skip
    assert content["split"] == dataclasses.asdict(SPLIT)
    host = 3 * GIB + 40
    assert content["memory"] == [
        {"tier": "host", "planned_bytes": 3 * GIB, "measured_bytes": host, "limit_bytes": 8 * GIB},
        {"tier": "device", "planned_bytes": GIB, "measured_bytes": GIB, "limit_bytes": 2 * GIB},
    ]
    (memory,) = [chart for chart in content["charts"] if chart["title"] == "Host memory"]
    assert {bar["label"]: bar["values"] for bar in memory["bars"]} == {
        "weights (bf16)": [2.0, 0.0], "framework": [1.0, 0.0], "measured peak": [0.0, host / GIB],
    }  # fmt: skip
    assert "weight slots (2)" in page and "3 GiB (+0.0%)" in page and "A step took 33% more than planned." in page
    assert page.index("measured peak</td>") < page.index("may be used</td>")  # which is no part of the sum above it
    assert "1 MiB, needed 1 MiB" in page and "run beside the arithmetic" in page


def test_rates_of_one_axis_look_alike():
    assert [short_rate(rate) for rate in (0.0, 7.5e-4, 1e-3, 1.25e-3, 0.02, 0.5)] == [
        "0", "7.5e-4", "1e-3", "1.25e-3", "2e-2", "0.5",
    ]  # fmt: skip


def test_the_rest_of_the_json_is_what_the_run_keeps(finished):
    folder, _, content = finished
    run = read_run(folder)
    assert content["numbers"] == run.numbers and content["status"] == "finished" and content["error"] is None
    assert content["checkpoints"] == [dataclasses.asdict(one) for one in run.checkpoints]
    assert content["samples"] == {"prompt": "once", "before": " xx", "after": " upon a time"}
    assert content["settings"]["optim.lr"] == 1e-3 and content["changed"] == ["optim.lr", "train.steps", "model.path"]
    assert content["environment"] == dataclasses.asdict(run.facts.environment)


def test_the_page_needs_nothing_else_and_has_every_part(finished):
    _, page, content = finished
    elements = check_page(page)
    headings = [text for tag, text in elements.text if tag == "h2"]
    assert headings == ["Training", "Samples", "Where a step's time goes", "Memory, planned and measured",
                        "Checkpoints", "Settings", "Environment"]  # fmt: skip
    assert len(charts(page)) == len(content["charts"]) == 9
    assert [text for tag, text in elements.text if tag == "title"] == ["my-model, " + "/".join(finished[0].parts[-2:])]
    assert "data:image/png;base64,iVBORw0KGgo=" in page
    assert "2 checkpoints; training stood still for 1 s, 5.00% of the time in steps." in page
    assert (
        "horizon train optim.lr=1e-3" in page and "abc1234" in page and "torch 2.11" in page and "box, 2 CPUs" in page
    )


def test_text_of_others_is_text_in_the_page(tmp_path):
    evil = "</pre><script>alert('x')</script><img src=http://a onerror=b>"
    settings = {"train": {"sample_prompt": evil}, evil: 1, "model": {"path": f"{evil}/{evil}"}}
    page, content = report(
        tmp_path / "a<b>&", [row(1)], settings, sample=evil,
        notes=facts(error=evil, traceback=evil, status="failed", prompt=evil, sample_before=evil),
    )  # fmt: skip
    elements = check_page(page)
    assert {tag for tag, _ in elements.tags} & {"img", "script"} == set()
    assert [text for tag, text in elements.text if tag == "pre"].count(evil) == 4
    assert (content["error"], content["samples"]["prompt"]) == (evil, evil)


def test_a_failed_run_says_so_first_with_its_last_good_step(tmp_path):
    rows = [row(1), row(2), row(3, loss=NAN, skipped=True)]
    notes = facts(status="failed", error="NonFiniteError: the loss is nan", split=None)
    page, content = report(tmp_path, rows, notes=notes, after=None, checkpoints=[checkpoint(2)])
    check_page(page)
    assert page.index("This run failed") < page.index('<section class="cards">') < page.index("<h2>Training")
    assert "The last good step is 2 of 40, with a loss of 4.9800." in page
    assert "NonFiniteError: the loss is nan" in page and "traceback" not in page
    assert f"checkpoint is of step 2: resume=auto hydra.run.dir={tmp_path} goes on from it" in page
    assert (content["status"], content["last_good_step"]) == ("failed", 2)
    assert "no finite loss, the first was step 3" in page
    assert drawn(content, "Loss", "training") == ([1, 2, 3], [4.99, 4.98, None])
    assert drawn(content, "Loss", "not finite")[0] == [3]


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_a_run_that_came_to_no_step_has_a_report(tmp_path, status):
    bare = facts(status=status, error="DataError: empty", planned=[], limits={}, predicted=None, split=None,
                 validation_loss_before=None, prompt=None, sample_before=None)  # fmt: skip
    page, content = report(tmp_path, [], notes=bare, after=None)
    check_page(page)
    assert "No step was completed." in page and charts(page) == [] == content["charts"]
    assert content["last_good_step"] is None and content["numbers"]["steps"] == 0


def test_a_run_of_an_earlier_version_has_one_too(tmp_path):
    page, content = report(tmp_path, [row(1), row(2)])
    check_page(page)
    assert content["environment"] is None and content["memory"] == [] and len(content["charts"]) == 7
    assert "A step&#39;s time" in page or "A step's time" in page


def test_thousands_of_steps_are_thinned_and_the_page_says_so(tmp_path):
    rows = [row(step, loss=0.1 if step == 1777 else 3.0) for step in range(1, 4001)]
    page, content = report(tmp_path, rows, notes=facts())
    (chart,) = [chart for chart in content["charts"] if chart["title"] == "Loss"]
    assert all(len(line["x"]) <= MOST_POINTS for line in chart["series"])
    mean, single = [line for line in chart["series"] if line["label"] != "validation"]
    assert (single["x"][0], single["x"][-1], min(single["y"])) == (1, 4000, 0.1)
    assert 1777 in single["x"] and min(mean["y"]) == pytest.approx(3.0 - 2.9 / 80)
    assert "Of 4,000 steps the highest and lowest of each stretch are drawn" in page and "mean of 80 steps" in page
    assert len(page) < 600_000


def test_zeroth_order_runs_have_projected_gradients_in_place_of_norms(tmp_path):
    rows = [row(step, grad_norm=NAN, projected_gradients=[0.5 * step, -1.0]) for step in (1, 2)]
    _, content = report(tmp_path, rows, notes=facts())
    titles = [chart["title"] for chart in content["charts"]]
    assert "Projected gradients" in titles and not {"Gradient norm", "Clipped steps"} & set(titles)
    assert drawn(content, "Projected gradients", "query 1") == ([1, 2], [0.5, 1.0])


def test_without_clipping_none_is_drawn(tmp_path):
    _, content = report(tmp_path, [row(1)], {"optim": {"max_grad_norm": None}}, notes=facts())
    assert "Clipped steps" not in [chart["title"] for chart in content["charts"]]
    (norm,) = [chart for chart in content["charts"] if chart["title"] == "Gradient norm"]
    assert [line["label"] for line in norm["series"]] == ["norm"]


def test_simulated_times_are_called_so(tmp_path):
    page, _ = report(tmp_path, [row(1, simulated=True)], notes=facts())
    assert "The cxl tier was simulated" in page


def test_a_loss_that_overflows_has_no_perplexity(tmp_path):
    page, content = report(tmp_path, [row(1, loss=1e30)], notes=facts(), after=1e9)
    assert "beyond any number" in page and content["numbers"]["validation_loss_after"] == 1e9
    assert math.isfinite(content["numbers"]["recent_loss"])


def test_the_hosts_measured_peak_is_compared_with_all_that_the_process_was_to_hold(tmp_path):
    planned = [Line("host", "weights (bf16)", 2 * GIB), Line("cxl", "exp_avg", GIB), Line("nvme", "padding", GIB)]
    _, content = report(tmp_path, [row(1)], notes=facts(planned=planned, limits={}))
    assert [(tier["tier"], tier["planned_bytes"], tier["measured_bytes"]) for tier in content["memory"]] == [
        ("host", 3 * GIB, 3 * GIB + 1), ("cxl", GIB, None), ("nvme", GIB, None),
    ]  # fmt: skip
    bars = {chart["title"]: chart["bars"] for chart in content["charts"] if "bars" in chart}
    assert {"label": "on cxl", "values": [1.0, 0.0]} in bars["Host memory"]
    assert bars["Memory on cxl"] == [{"label": "exp_avg", "values": [1.0]}]
