import pytest

from horizon.report.measurements import Measurements, Row, Run, Skipped, describe, three_digits
from horizon.report.tier_tables import table_of
from horizon.report.tiers import findings, glance, sections

RUN = Run(machine="m", commit="c", versions={}, command="x", date="d", seconds=1.0, facts={})


def row(test, value, place="dram node 0", unit="GB/s", best=None, also=None, **settings):
    return Row.of(test, place, settings, unit, [value, value, best or value], also=also or {})


def measured(*rows, skipped=()):
    return Measurements(RUN, rows, skipped)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2.1, "2.10"), (15, "15.0"), (9.999, "10.0"), (99.96, "100"), (265.4, "265"), (1234.5, "1,230"),
     (0.05, "0.0500"), (0.0004, "0.0004"), (2.5e7, "2.5e+07")],
)  # fmt: skip
def test_three_digits_are_three_digits(value, text):
    assert three_digits(value) == text


def test_settings_read_like_a_sentence():
    said = [describe("threads", 1), describe("threads", 2), describe("block", 1 << 20), describe("states", "all"),
            describe("states", "gradients"), describe("parameters", 2e8)]  # fmt: skip
    assert said == ["1 thread", "2 threads", "blocks of 1 MiB", "all states", "only gradients", "200 M parameters"]


def test_one_setting_is_across_and_what_all_share_is_in_the_caption():
    rows = [row("bandwidth", 10.0 * threads, cpus="node 0", access=access, threads=threads, block=4096)
            for access in ("read", "write") for threads in (1, 2)]  # fmt: skip
    table = table_of(measured(*rows), "bandwidth", "Bandwidth")
    assert table.columns == ("where", "access", "1", "2") and table.numeric == ("1", "2")
    assert table.rows == (("dram node 0", "read", "10.0", "20.0"), ("dram node 0", "write", "10.0", "20.0"))
    assert table.says == "GB/s by threads, from node 0, blocks of 4 KiB: median of 3."


def test_the_best_is_told_where_it_is_much_better_and_what_was_not_measured_is_empty():
    rows = (
        row("latency", 100.0, unit="ns", best=80.0, cpus="node 0", size=1024),
        row("latency", 100.0, unit="ns", best=95.0, cpus="node 0", size=2048),
        row("latency", 300.0, "cxl node 1", unit="ns", cpus="node 0", size=2048),
    )
    assert table_of(measured(*rows), "latency", "t").rows == (
        ("dram node 0", "100 (80.0)", "100"), ("cxl node 1", "", "300"),
    )  # fmt: skip


def test_latency_under_load_is_told_with_the_load():
    same = {"unit": "ns", "cpus": "node 0", "loaders": 3}
    rows = [row("loaded latency", 100.0 + load, **same, pause=pause, also={"load_gb_per_s": load})
            for pause, load in ((10_000, 5.0), (0, 50.0))]  # fmt: skip
    table = table_of(measured(*rows), "loaded latency", "t")
    assert table.columns == ("where", "0", "10,000") and table.rows == (("dram node 0", "150 at 50.0", "105 at 5.00"),)
    assert table.says.startswith("ns by pause between blocks, from node 0, 3 loaders:") and "at: the GB/s" in table.says


STEP = {"unit": "s", "parameters": 1e6, "tokens": 512}
STEPS = (
    row("step", 2.0, "dram", best=1.5, also={"planned_s": 1.0}, **STEP),
    row("step", 0.5, "interleave", also={"planned_s": 0.55, "on_cxl_bytes": 2.0**30}, **STEP),
)


def test_steps_say_how_far_their_plans_are_off():
    table = table_of(measured(*STEPS), "step", "t")
    assert table.rows == (
        ("dram", "1.00 s", "2.00 s", "1.50 s", "-50%", ""),
        ("interleave", "550 ms", "500 ms", "500 ms", "+10%", "1 GiB"),
    )  # fmt: skip
    assert table.says.startswith("A step, 1 M parameters, 512 tokens: median of 3")


def test_what_follows_tells_how_good_plans_are_and_whether_something_disturbed():
    assert findings(measured(*STEPS)) == [
        "1 of 2 policies took what was planned, within 20%; furthest off is dram: planned 1.00 s, took 2.00 s.",
        "1 of 2 medians are more than 20% worse than their best: something else used this machine, or what it runs on.",
    ]
    assert findings(measured(row("latency", 1.0, unit="ns", cpus="node 0", size=1024))) == []


def test_tiers_are_told_at_a_glance():
    rows = (
        row("latency", 100.0, unit="ns", cpus="node 0", size=1024),
        row("latency", 200.0, unit="ns", cpus="node 1", size=1024),
        row("bandwidth", 30.0, cpus="node 0", access="read", threads=1, block=4096),
        row("link", 50.0, direction="H2D", memory="pinned", size=1024),
        row("link", 9.0, direction="H2D", memory="pageable", size=1024),
        row("disk", 2.0, "disk", access="read", depth=1, block=4096, io="direct"),
    )
    table = glance(measured(*rows))
    assert table.columns == ("tier", "idle latency, ns", "read, GB/s", "H2D, GB/s")
    assert table.rows == (("dram node 0", "100", "30.0", "50.0"), ("disk", "", "2.00", ""))


def test_a_part_whose_hardware_is_not_there_says_so_in_one_line():
    found = {
        s.part.title: s for s in sections(measured(*STEPS, skipped=(Skipped(test="link", place="hbm", reason="none"),)))
    }
    link, steps = found["Link to the GPU"], found["Steps under each policy"]
    assert (link.charts, link.tables, link.missing) == ([], [], ["hbm: none"])
    assert len(steps.charts) == len(steps.tables) == 1 and not steps.missing


def test_engines_are_told_as_parts_of_raw_access():
    rows = [
        row("nvme", value, "disk", also={"of_raw": value / 2.0, "cores": 0.1}, engine=engine, access="read", size=1024)
        for engine, value in (("raw", 2.0), ("direct", 1.9), ("tensorstore", 0.8))
    ]
    table = table_of(measured(*rows), "nvme", "t")
    assert table.rows == (
        ("disk", "raw", "2.00, 100%"), ("disk", "direct", "1.90, 95%"), ("disk", "tensorstore", "0.800, 40%"),
    )  # fmt: skip
    assert table.says.endswith("median of 3, and that as a part of raw access.")
    assert findings(measured(*rows)) == [
        "The direct engine of the nvme tier reaches 95% (read) of raw access.",
        "The tensorstore engine of the nvme tier reaches 40% (read) of raw access.",
    ]
    assert glance(measured(*rows)).rows == ()  # what the disk gives is told by its own test
    (chart,) = next(s for s in sections(measured(*rows)) if s.part.title == "Disk").charts
    assert (chart.names, chart.bars) == (("raw", "direct", "tensorstore"), (("read", (2.0, 1.9, 0.8)),))
