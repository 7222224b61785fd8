from dataclasses import replace

import pytest

from horizon.commands.report import run as report
from horizon.errors import ConfigError, DataError
from horizon.report.compare import Pair, compare
from horizon.report.measurements import Measurements, Row, Run
from tests.report.pages import check_page

RUN = Run(
    machine="box", commit="abc", versions={"torch": "2"}, command="horizon bench tiers", date="d", seconds=1.0, facts={}
)


def row(value, unit="GB/s", test="bandwidth", place="dram", simulated=False, **settings):
    return Row.of(test, place, {"access": "read", **(settings or {"threads": 2})}, unit, [value], simulated=simulated)


def run(*rows, machine="box"):
    return Measurements(Run(**{**{f: getattr(RUN, f) for f in RUN.__slots__}, "machine": machine}), rows)


@pytest.mark.parametrize(
    ("unit", "a", "b", "gain", "verdict"),
    [
        ("GB/s", 10.0, 20.0, 2.0, "better"),
        ("GB/s", 10.0, 5.0, 0.5, "worse"),
        ("ns", 10.0, 20.0, 0.5, "worse"),
        ("s", 10.0, 5.0, 2.0, "better"),
        ("Gparam/s", 10.0, 10.5, 1.05, "as good"),
        ("ns", 10.0, 10.5, 10 / 10.5, "as good"),
    ],
)
def test_what_is_better_depends_on_the_unit(unit, a, b, gain, verdict):
    pair = Pair(row(a, unit), row(b, unit), "")
    assert (pair.gain, pair.verdict) == (pytest.approx(gain), verdict)


def test_rows_are_paired_by_what_was_measured_not_by_their_place_in_the_file():
    a = run(row(1.0, threads=1), row(2.0, threads=2), row(9.0, "ns", "latency", size=1))
    b = run(row(4.0, threads=2), row(3.0, threads=1), row(9.0, place="cxl node 1"), machine="other")
    found = compare(a, b)
    assert [(pair.a.median, pair.b.median) for pair in found.pairs] == [(1.0, 3.0), (2.0, 4.0)]
    assert (found.only_a, found.only_b) == (1, 1)
    assert "2 rows in both: B is 2 better, 0 as good, 0 worse" in "\n".join(found.summary())


def test_the_best_of_each_tier_is_compared_whatever_it_took():
    a = run(row(10.0, test="disk", place="disk", access="read", depth=1), row(1.0, test="link", direction="H2D"))
    b = run(row(30.0, test="disk", place="disk", access="read", depth=8), row(1.0, test="link", direction="H2D"))
    best = {pair.a.place: pair.gain for pair in compare(a, b).best}
    assert best == {"disk, read": 3.0, "dram, H2D": 1.0}
    assert "disk, read" in compare(a, b).markdown()


def test_the_best_of_both_says_what_it_took_and_leaves_out_stand_ins():
    a = run(row(10.0, test="disk", place="disk", access="read", depth=1), row(2.0, "Gparam/s", "adamw", states="all",
            parameters=1, place="cxl (simulated)", simulated=True))  # fmt: skip
    b = run(*(replace(one, settings={**one.settings, "depth": 8}) if one.test == "disk" else one for one in a.rows))
    (pair,) = compare(a, b).best
    assert (pair.a.place, pair.settings) == ("disk, read", "A: 1 request; B: 8 requests")


def test_the_machines_stand_side_by_side():
    a, b = run(row(1.0)), run(row(1.0), machine="other")
    b = replace(b, run=replace(b.run, facts={"virtual": "yes"}))
    found = {name: (of_a, of_b) for name, of_a, of_b in compare(a, b).sources()}
    assert found["machine"] == ("box", "other") and found["virtual"] == ("-", "yes") and "torch" not in found


def test_disks_and_copies_of_both_have_lines_of_their_own():
    def found(value):
        disks = [row(value, test="disk", place="disk", access=access, depth=depth, block=4096, io="direct")
                 for access in ("read", "write") for depth in (1, 2)]  # fmt: skip
        link = [row(value, test="link", place="dram", direction="H2D", memory="pinned", size=size) for size in (1, 2)]
        return run(*disks, *link)

    lines = {
        (chart["title"], line["label"]): line["y"]
        for chart in (chart.as_json() for chart in compare(found(1.0), found(3.0)).charts())
        for line in chart.get("series", ())
    }
    assert lines["Disk, read", "A: 4 KiB"] == [1.0, 1.0] and lines["Disk, read", "B: 4 KiB"] == [3.0, 3.0]
    assert lines["Copies by size", "A: H2D pinned"] == [1.0, 1.0]
    assert lines["Copies by size", "B: H2D pinned"] == [3.0, 3.0]


def test_nothing_in_common_is_refused():
    with pytest.raises(DataError, match="no row in common"):
        compare(run(row(1.0, threads=1)), run(row(1.0, threads=2)))


def test_the_best_and_the_median_of_a_row():
    assert (Row.of("t", "p", {}, "ns", [3.0, 1.0, 2.0]).best, Row.of("t", "p", {}, "GB/s", [3.0, 1.0, 2.0]).best) == (
        1.0,
        3.0,
    )
    assert Row.of("t", "p", {}, "s", [3.0, 1.0, 2.0]).median == 2.0


@pytest.fixture
def files(tmp_path):
    settings, step = {"threads": 2, "block": 4096, "cpus": "node 0"}, ("s", "step", "cxl_aware")
    run(row(1.0, **settings), row(2.0, *step, simulated=True)).write(tmp_path / "a.json")
    run(row(4.0, **settings), row(1.0, *step, simulated=True), machine="new").write(tmp_path / "b.json")
    return [str(tmp_path / "a.json"), str(tmp_path / "b.json")]


@pytest.mark.parametrize("kind", ["html", "md"])
def test_the_command_prints_and_writes(files, tmp_path, capsys, kind):
    out = tmp_path / f"c.{kind}"
    assert report(["compare", *files, "--out", str(out)]) == 0
    shown, written = capsys.readouterr().out, out.read_text()
    for text in (shown, written):
        assert "4.00 x" in text and "2.00 x" in text
        assert "cxl_aware (simulated)" in text and "no measure of real CXL" in text
    assert "new; commit abc" in shown and ("new; commit abc" in written or kind == "html")
    if kind == "html":
        elements = check_page(written)
        assert "better" in written and "<td>box</td><td>new</td>" in written
        assert {"A: dram", "B: dram"} <= {data for tag, data in elements.text if tag == "text"}


def test_wrong_arguments_are_one_line(files, tmp_path):
    for arguments, message in (
        (["compare", *files, "--out", "c.pdf"], r"--out=c\.pdf: expected a name that ends in \.html or \.md"),
        (["compare", files[0]], r"required: b \(horizon report compare --help\)"),
        (["compare", *files, "--out", "/proc/none/c.md"], "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=message):
            report(arguments)
    with pytest.raises(DataError, match=r"cannot read none\.json"):
        report(["compare", files[0], "none.json"])
