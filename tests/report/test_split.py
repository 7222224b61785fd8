"""Means, shares and least bytes of recorded steps, on timelines written by hand and on a simulated device."""

import dataclasses
import json

import pytest

from horizon.report.metrics import to_json
from horizon.report.split import describe_split, split_of
from horizon.stream.timeline import Cause, Span, StepTimeline
from tests.stream.simulated import Durations, simulate
from tests.stream.steps import tiny_model

A, L, O, D, N = Cause.arithmetic, Cause.link, Cause.optimizer, Cause.data, Cause.launch  # noqa: E741


def step(start, compute, others=()):
    """A step whose compute lane is (what, cause, seconds) after one another."""
    spans, at = [], start
    for what, cause, seconds in compute:
        spans.append(Span("compute", what, 0, at, at + seconds, cause))
        at += seconds
    return StepTimeline(start, at, (*spans, *others))


def copied(lane, what, start, seconds, num_bytes):
    return Span(lane, what, 1, start, start + seconds, None, num_bytes)


FIRST = step(
    0.0,
    [("between steps", D, 0.5), ("weights", L, 1.0), ("forward", A, 2.0), ("issuing", N, 0.25), ("head", A, 1.0)],
    [
        copied("H2D", "weights", 0.5, 1.0, 1000),
        copied("D2H", "boundary", 1.5, 0.5, 300),
        Span("update 0", "update", 0, 0.0, 2.0, None, 4_000_000_000),
        Span("update 1", "update", 0, 0.0, 1.0, None, 2_000_000_000),
    ],
)
SECOND = step(
    4.75,
    [("update", O, 3.0), ("forward", A, 2.0), ("backward", A, 4.0), ("last gradient", L, 1.0)],
    [
        copied("H2D", "weights", 5.0, 0.5, 1000),
        copied("H2D", "boundary", 5.5, 0.5, 300),
        copied("H2D", "gradient", 6.0, 0.25, 40),
        copied("D2H", "gradient", 6.0, 3.0, 5000),
        dataclasses.replace(Span("update 0", "update", 0, 5.0, 6.0, None, 2_000_000_000)),
    ],
)


def test_the_six_parts_are_means_that_add_up_to_the_step():
    split = split_of([FIRST, SECOND], {})
    assert (split.steps, split.step_ms) == (2, 7375)
    parts = split.arithmetic_ms, split.link_ms, split.optimizer_ms, split.disk_ms, split.data_ms, split.launch_ms
    assert parts == (4500, 1000, 1500, 0, 250, 125)
    assert sum(parts) == split.step_ms
    assert (split.forward_ms, split.head_ms, split.backward_ms) == (2000, 500, 2000)


def test_traffic_is_compared_with_what_a_step_needs():
    split = split_of([FIRST, SECOND], {("H2D", "weights"): 900, ("D2H", "gradient"): 2500})
    traffic = {(t.direction, t.what): (t.num_bytes, t.least_bytes, t.busy_ms) for t in split.traffic}
    assert traffic == {
        ("H2D", "weights"): (1000, 900, 750),
        ("D2H", "boundary"): (150, 150, 250),
        ("H2D", "boundary"): (150, 150, 250),
        ("H2D", "gradient"): (20, 0, 125),
        ("D2H", "gradient"): (2500, 2500, 1500),
    }


def test_an_update_by_itself_takes_its_threads_time_shared_among_them():
    split = split_of([FIRST, SECOND], {})
    assert (split.update_threads, split.update_bytes) == (2, 4_000_000_000)
    assert split.update_ms == 1000  # four seconds in all, of two threads, in two steps
    assert split.update_bytes_per_s == 4e9


def test_without_updates_nothing_is_divided_by_zero():
    split = split_of([step(0.0, [("forward", A, 1.0)])], {})
    assert (split.update_threads, split.update_ms, split.update_bytes_per_s, split.traffic) == (0, 0, 0, [])
    assert "0 threads" in describe_split(split)


def test_time_at_the_hosts_pace_is_part_of_arithmetic():
    timeline = step(0.0, [("forward", A, 2.0)])
    (span,) = timeline.spans
    split = split_of([StepTimeline(0.0, 2.0, (dataclasses.replace(span, paced=1.5),))], {})
    assert (split.arithmetic_ms, split.host_paced_ms) == (2000, 1500)


def test_what_compute_updates_itself_is_no_wait_for_host_memory():
    split = split_of([step(0.0, [("forward", A, 1.0), ("HBM update", O, 3.0), ("update", O, 0.01)])], {})
    assert (split.optimizer_ms, split.hbm_update_ms) == (3010, 3000)
    table = describe_split(split)
    assert "3,000 ms of it updating in HBM" in table and "bounds" not in table


def test_the_table_names_every_part_and_explains_a_slow_update():
    table = describe_split(split_of([FIRST, SECOND], {("H2D", "weights"): 900}))
    for text in (
        "a step of 7,375 ms, mean of 2 recorded", "arithmetic", "61.0%", "forward 2,000 ms", "waiting for link",
        "waiting for optimizer", "20.3%", "waiting for data", "waiting for launches", "H2D weights", "at least 900 B",
        "3.73 GiB", "(4 GB/s) on 2 threads", "host memory bounds this step", "the update alone takes 1,000 ms",
    ):  # fmt: skip
        assert text in table, text
    assert "bounds" not in describe_split(split_of([FIRST], {}))
    assert all(len(line) < 150 for line in table.splitlines())


def test_it_is_strict_json_with_records_inside():
    split = split_of([FIRST, SECOND], {})
    read = json.loads(to_json(dataclasses.replace(split, step_ms=float("nan"))))
    assert read == dataclasses.asdict(split) | {"step_ms": None}


@pytest.mark.parametrize("weight_slots", [1, 2, 3])
@pytest.mark.parametrize("turn_layers", [0, 2])
def test_a_simulated_steps_parts_add_up(weight_slots, turn_layers):
    timeline, _ = simulate(
        tiny_model(), Durations(data=5, issue=1, published={1: 90}), weight_slots=weight_slots, num_micro_batches=2,
        turn_layers=turn_layers,
    )  # fmt: skip
    split = split_of([timeline], {})
    parts = split.arithmetic_ms, split.link_ms, split.optimizer_ms, split.disk_ms, split.data_ms, split.launch_ms
    assert sum(parts) == split.step_ms == (timeline.end - timeline.start) * 1000
    assert [part > 0 for part in parts] == [True, True, True, False, True, True]  # nothing on disk
    assert split.forward_ms + split.head_ms + split.backward_ms == split.arithmetic_ms
