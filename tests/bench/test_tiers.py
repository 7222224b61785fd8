"""`horizon bench tiers` as a whole, as small as it goes, and the page it writes."""

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from horizon.bench import places, tiers
from horizon.bench.places import Place, simulated_place
from horizon.bench.policies import Shape, policies
from horizon.bench.tiers import Options, Plan, measure_tiers
from horizon.bench.update import update
from horizon.commands import bench as command
from horizon.config.schema import Policy
from horizon.errors import BudgetError, ConfigError, DataError, TierError
from horizon.report import environment
from horizon.report.measurements import Measurements, Row, Skipped
from horizon.report.tier_charts import _nearest, _readable, charts_of
from horizon.report.tiers import TESTS, findings, headlines, write_html, write_markdown
from horizon.store.arena import Arena
from horizon.stream.pcie import PcieLink
from horizon.stream.streams import Streams
from horizon.units import KIB, MIB
from tests.bench.test_memory import TINY
from tests.report.pages import charts, check_page

PLAN = Plan(
    memory=TINY, link_sizes=(MIB,), disk_bytes=MIB, depths=(1, 2), disk_blocks=(64 * KIB,), disk_seconds=0.1,
    nvme_bytes=64 * MIB, parameters=(10_000, 400_000), shape=Shape(64, 2, 128, rows=2, seq_len=16, steps=2),
    gpu_shape=Shape(64, 2, 128, rows=2, seq_len=16, steps=2), repeats=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    options = Options(PLAN, folder, 1.0, ["horizon", "bench", "tiers", "--quick"])
    return measure_tiers(options, lambda what, found: found)


@pytest.fixture(scope="module")
def page(measured, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "tiers.html"
    write_html(measured, path)
    return path.read_text()


def test_every_test_that_the_machine_allows_has_rows_and_others_a_reason(measured):
    missing = {test for test in TESTS if not measured.of(test)}
    assert missing <= {"link", "hbm", "loaded latency"}
    assert all(any(one.test == test for one in measured.skipped) for test in missing - {"hbm"})
    assert all(one.reason for one in measured.skipped)


def test_every_policy_has_a_step_or_a_reason(measured):
    steps = {row.place.removesuffix(" (simulated)"): row for row in measured.of("step")}
    assert {*steps, *(one.place for one in measured.skipped if one.test == "step")} == set(Policy)
    for policy in ("dram", "cxl_aware", "interleave"):
        assert steps[policy].also["planned_s"] > 0
        assert steps[policy].simulated is (policy != "dram")
    assert steps["interleave"].also["on_cxl_bytes"] > 0 and "on_cxl_bytes" not in steps["dram"].also


def test_whatever_is_simulated_says_so_in_every_file(measured, page, tmp_path):
    marked = [row for row in measured.rows if row.simulated]
    assert {row.test for row in marked} == {"adamw", "step"}
    assert all("simulated" in row.place for row in marked)
    assert {row.settings.get("tier_gb_per_s") for row in marked} == {1.0}  # stand-ins of other speeds are no pair
    assert "Some rows are simulated" in page and "(with a simulated tier)" in page
    for cells in re.findall(r"<tr[^>]*>(.*?)</tr>", page):
        if "cxl" in cells and "<td" in cells and "no memory-only" not in cells:
            assert "simulated" in cells
    write_markdown(measured, tmp_path / "t.md")
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert any("no measure of real CXL" in line for line in lines)
    assert all("simulated" in line for line in lines if line.startswith("| cxl") and "no memory-only" not in line)


def test_without_a_simulated_tier_nothing_says_so(measured, tmp_path):
    real = replace(measured, rows=tuple(row for row in measured.rows if not row.simulated))
    write_html(real, tmp_path / "t.html")
    write_markdown(real, tmp_path / "t.md")
    assert "imulated" not in re.sub(
        r"data:[^\"]+|cxl_simulated", "", (tmp_path / "t.html").read_text().split("</style>")[1]
    )
    assert "simulated" not in (tmp_path / "t.md").read_text().replace("cxl_simulated", "")


def test_the_page_needs_nothing_else(measured, page):
    check_page(page)
    pictures = charts(page)
    assert len(set(pictures)) == len(pictures) == page.count("<figure>") == len(charts_of(measured)) >= 6


def test_a_chart_keeps_the_points_that_it_draws(two_sockets):
    data = {chart.title: chart.as_json() for chart in charts_of(two_sockets)}
    lines = {line["label"]: (line["x"], line["y"]) for line in data["Idle latency"]["series"]}
    assert lines["dram node 1"] == ([32 * KIB, MIB], [2, 91])
    pairs = data["Latency by pair"]
    assert (pairs["columns"][1], pairs["rows"][0], pairs["values"][0][1]) == ("dram\nnode 1", "from\nnode 0", 140)
    assert {bar["label"]: bar["values"] for bar in data["Copies by memory"]["bars"]}["H2D pinned"] == [50.0]


def test_the_page_escapes_what_it_shows(measured, tmp_path):
    odd = replace(measured, run=replace(measured.run, machine="<b>&", command="a <script> b"))
    write_html(odd, tmp_path / "t.html")
    assert "<script" not in (tmp_path / "t.html").read_text() and "&lt;b&gt;&amp;" in (tmp_path / "t.html").read_text()


def test_rows_read_back_as_they_were_and_each_says_where_it_is_from(measured, tmp_path):
    path = tmp_path / "tiers.json"
    measured.write(path)
    assert Measurements.read(path) == measured
    for row in json.loads(path.read_text())["rows"]:
        assert {"machine", "commit", "versions", "command", "n", "best", "median"} <= row.keys()
        assert row["command"] == "horizon bench tiers --quick" and "torch" in row["versions"] and row["commit"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "rows": [{"a": 1}]}', '{"format": 9}']
)
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"x\.json (is not a file that|has format 9)"):
        Measurements.read(path)
    with pytest.raises(DataError, match="cannot read"):
        Measurements.read(tmp_path / "none.json")


def test_a_simulated_tier_is_no_faster_than_it_says():
    for row in update(simulated_place(0.5), Place("dram"), [200_000], [1, 2], repeats=2):
        share = 26 if row.settings["states"] == "all" else 2
        assert row.best * share <= 0.5 * 1.01


def test_the_default_of_the_simulated_tier_is_a_share_of_the_largest_update(measured):
    largest = [r for r in measured.of("adamw") if r.place == "dram node 0" and r.settings["parameters"] == 400_000]
    best = max(row.also["gb_per_s"] for row in largest)
    rows = [row for row in measured.rows if not row.simulated]
    assert tiers._simulated_gb_per_s(None, [Place("dram")], rows) == round(best / 4, 1)
    assert tiers._simulated_gb_per_s(None, [Place("dram"), Place("cxl node 1", (1,), True)], rows) == 0.0
    assert tiers._simulated_gb_per_s(0.0, [Place("dram")], rows) == 0.0


def test_what_fails_is_a_reason_and_the_rest_is_measured(monkeypatch, tmp_path):
    def fail(*_):
        raise TierError("the disk is gone")
        yield

    for name in ("latency", "bandwidth", "loaded_latency", "update"):
        monkeypatch.setattr(tiers, name, fail)
    monkeypatch.setattr(tiers, "policies", lambda *given: iter([Skipped(test="step", place=f"{given[1]}", reason="r")]))
    found = measure_tiers(Options(PLAN, tmp_path, None, ["x"]), lambda what, found: found)
    assert {row.test for row in found.rows} == {"disk", "nvme"}
    reasons = {one.test: one.reason for one in found.skipped}
    assert reasons["adamw"] == reasons["latency"] == "the disk is gone"
    assert [one.place for one in found.skipped if one.test == "step"] == ["0.0"]  # nothing to take a share of


def test_with_a_gpu_every_memory_has_copies_and_the_step_is_a_larger_one(monkeypatch, tmp_path):
    """The stand-in for a device copies at once; what CUDA would say of the machine is made up."""
    shapes, cpu = [], Streams.on(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(environment, "pcie_link", lambda: PcieLink(5, 16, 16, 0))
    monkeypatch.setattr(tiers, "Streams", SimpleNamespace(on=lambda device: cpu))
    monkeypatch.setattr("horizon.bench.link.Arena", lambda sizes, purpose, pin, nodes: Arena(sizes, purpose, False, ()))
    monkeypatch.setattr(tiers, "find_places", lambda *_: [Place("dram node 0"), Place("dram node 1")])
    for name in ("latency", "bandwidth", "loaded_latency", "update", "disk"):
        monkeypatch.setattr(tiers, name, lambda *_: iter([]))
    monkeypatch.setattr(tiers, "policies", lambda shape, *_: shapes.append(shape) or iter([]))
    plan = replace(PLAN, gpu_shape=replace(PLAN.shape, seq_len=64))
    found = measure_tiers(Options(plan, tmp_path, None, ["x"]), lambda what, found: found)
    kinds = {(row.place, row.settings["direction"], row.settings["memory"]) for row in found.of("link")}
    assert kinds == {(place, way, "pageable") for place in ("dram node 0", "dram node 1") for way in ("H2D", "D2H")}
    assert [one.place for one in found.skipped if one.test == "link"] == ["dram node 0, pinned", "dram node 1, pinned"]
    assert shapes == [plan.gpu_shape] and [row.settings for row in found.of("hbm")] == [{"size": MIB}]
    assert found.run.machine.endswith(", NVIDIA H200")
    assert found.run.facts["GPU link"] == "PCIe generation 5, 16 lanes, next to NUMA node 0"


def test_other_work_is_that_before_the_measurement(monkeypatch, tmp_path):
    loads = iter([0.5, 7.0])
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    monkeypatch.setattr(tiers, "_tests", lambda *_: iter([]))
    run = measure_tiers(Options(PLAN, tmp_path, 0.0, ["x"]), lambda what, found: found).run
    assert run.facts["other work"].startswith("load 0.5") and " on " in run.facts["disk"]


def test_an_update_that_does_not_fit_is_refused_after_those_that_do(monkeypatch):
    monkeypatch.setattr(places, "available_host_bytes", lambda: 20 * MIB)
    rows = []
    with pytest.raises(BudgetError, match="measuring cxl"):
        rows.extend(update(simulated_place(50.0), Place("dram"), [10_000, 4_000_000], [1], repeats=1))
    assert {row.settings["parameters"] for row in rows} == {10_000}
    assert {row.settings["states"] for row in rows} == {"all", "gradients"}


@pytest.mark.parametrize(("limit", "steps"), [(60.0, 5), (0.0, 3)])
def test_on_a_slow_machine_a_policy_has_fewer_steps(monkeypatch, tmp_path, limit, steps):
    monkeypatch.setattr("horizon.bench.policies.LIMIT_S", limit)
    monkeypatch.setattr("horizon.bench.policies.Policy", [Policy.dram])
    (one,) = policies(Shape(64, 2, 128, rows=2, seq_len=16, steps=5), 0.0, tmp_path)
    assert one.n == steps


# ---- the command


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(command, "QUICK", PLAN)


def test_the_command_writes_three_files(quick, tmp_path, capsys):
    assert command.run(["tiers", "--quick", "--out", str(tmp_path / "a" / "b"), "--simulate", "0"]) == 0
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"tiers.html", "tiers.md", "tiers.json"}
    shown = capsys.readouterr()
    assert re.match(r"\d+ rows in \d+ s\nhtml .*tiers\.html\nmd .*\njson .*\n", shown.out)
    assert (
        "measuring adamw: dram node 0" in shown.err
        and "not measured: step, cxl_aware: memory.cxl_nodes=auto" in shown.err
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError])
def test_what_is_stopped_leaves_no_folder_behind(quick, monkeypatch, tmp_path, error):
    def stopped(*_):
        raise error

    monkeypatch.setattr(command, "measure_tiers", stopped)
    for there in (False, True):
        out = tmp_path / f"out {there}"
        if there:
            out.mkdir()
        with pytest.raises(error):
            command.run(["tiers", "--quick", "--out", str(out)])
        assert out.exists() is there


def test_on_a_terminal_rows_are_counted(monkeypatch, capsys):
    monkeypatch.setattr(command.sys.stderr, "isatty", lambda: True, raising=False)
    assert list(command._watch("disk: disk", iter([1, 2, 3]))) == [1, 2, 3]
    assert "disk: disk: 3 rows, 00:00" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["jinja2", "matplotlib"])
def test_a_missing_library_is_told_before_anything_is_measured(monkeypatch, tmp_path, name):
    monkeypatch.setattr(command, "measure_tiers", lambda *_: pytest.fail("measured"))
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("horizon.report.page.find_spec", lambda wanted: None if wanted == name else True)
    with pytest.raises(
        ConfigError, match=rf"a report needs {name}, which is not installed: pip install 'horizon\[report\]'"
    ):
        command.run(["tiers", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiers", "--simulate", "-1"], r"--simulate=-1\.0: expected GB/s"),
        (["tiers", "--fast"], r"unrecognized arguments: --fast \(horizon bench --help\)"),
        (["levels"], r"invalid choice: 'levels'"),
        ([], r"required: what"),
        (["tiers", "--out", "/proc/none/x"], r"is not a folder that can be made"),
        (["tiers", "--out", "/proc/self"], r"--out=/proc/self is not a folder that can be written to"),
        (
            ["tiers", "--out", "OUT", "--disk", "/none"],
            r"--disk=/none is not a folder .* \(No such file or directory\)",
        ),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "measure_tiers", lambda *_: pytest.fail("measured"))
    with pytest.raises(ConfigError, match=message):
        command.run([str(tmp_path / "out") if one == "OUT" else one for one in arguments])
    assert not list(tmp_path.iterdir())


def row(test, place, settings, unit, value, **more):
    return Row.of(test, place, settings, unit, [value, value], **more)


@pytest.fixture
def two_sockets(measured):
    """Rows as a machine with two sockets, an expander and a GPU would give."""
    rows = []
    for cpus, far in (("node 0", "dram node 1"), ("node 1", "dram node 0")):
        for place, ns, gb_per_s in (("dram node 0", 90, 200), ("dram node 1", 91, 210), ("cxl node 2", 250, 28)):
            ns, gb_per_s = (140, 120) if place == far else (ns, gb_per_s)
            for size, value in ((32 * KIB, 1.5 if place == far else 2), (MIB, ns)):
                rows.append(row("latency", place, {"cpus": cpus, "size": size}, "ns", value))
            for access in ("read", "write"):
                settings = {"cpus": cpus, "access": access, "threads": 8, "block": MIB}
                rows.append(row("bandwidth", place, settings, "GB/s", gb_per_s))
    for memory in ("pinned", "pageable"):
        for direction in ("H2D", "D2H"):
            settings = {"direction": direction, "memory": memory, "size": MIB}
            rows.append(row("link", "dram node 0", settings, "GB/s", 50.0))
    return replace(measured, rows=tuple(rows), skipped=())


def test_a_machine_with_several_nodes_has_matrices_and_lines_from_the_nearest_processors(two_sockets, tmp_path):
    titles = [chart.title for chart in charts_of(two_sockets)]
    assert "Latency by pair" in titles and "Read bandwidth by pair" in titles and "Copies by memory" in titles
    nearest = {(r.place, r.settings["cpus"]) for r in _nearest(two_sockets.of("latency"))}
    assert ("dram node 0", "node 0") in nearest and ("dram node 1", "node 1") in nearest and len(nearest) == 3
    assert {r.settings["access"] for r in _readable(two_sockets.of("bandwidth"))} == {"read"}
    cards = {card.name: card.median for card in headlines(two_sockets)}
    assert (
        cards["dram node 1, idle latency"] == 91
        and cards["dram node 0, read"] == 200
        and cards["dram node 0, H2D"] == 50
    )
    write_html(two_sockets, tmp_path / "t.html")


def test_a_machine_with_one_node_has_no_matrices(measured):
    assert not [chart for chart in charts_of(measured) if "pair" in chart.title]


def test_what_follows_compares_tiers_by_the_best_row_of_the_largest_update(measured):
    def update_row(place, states, parameters, value):
        return row("adamw", place, {"states": states, "parameters": parameters, "threads": 1}, "Gparam/s", value)

    rows = (
        update_row("dram node 0", "all", 10, 9.0), update_row("dram node 0", "all", 100, 4.0),
        update_row("cxl node 1", "all", 100, 1.0), update_row("cxl node 1", "gradients", 100, 3.0),
    )  # fmt: skip
    assert findings(replace(measured, rows=rows)) == [
        "AdamW with all states on cxl node 1 runs at 25% of its pace in dram node 0, with only the gradients there at "
        "75%."
    ]
