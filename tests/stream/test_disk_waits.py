"""What compute waits for because of the disk is told from what it waits for because of the update."""

import json
import time

import pytest

from horizon import MemoryConfig
from horizon.config.schema import Tier, TierRule
from horizon.report.trace import lanes
from horizon.store import disk, nvme
from horizon.stream.timeline import COMPUTE, Cause, Span, _blame_disk
from tests.parity.reference import build, engine_for, plain

WAIT = Span(COMPUTE, "update", 3, 10.0, 20.0, Cause.optimizer)


def cut(*beside):
    """(start, end, cause) of the parts of a wait from 10 to 20."""
    spans = sorted((Span(lane, "x", 0, start, end) for lane, start, end in beside), key=lambda span: span.start)
    return [(span.start, span.end, span.cause.value) for span in _blame_disk([WAIT], spans)]


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ([], [(10, 20, "optimizer")]),
        ([("update 0", 9, 30)], [(10, 20, "optimizer")]),
        ([("disk 0", 9, 30)], [(10, 20, "disk")]),
        ([("disk 0", 5, 14)], [(10, 14, "disk"), (14, 20, "optimizer")]),
        (
            [("disk 0", 5, 14), ("disk 1", 13, 19), ("update 1", 12, 15)],
            [(10, 12, "disk"), (12, 13, "optimizer"), (13, 14, "optimizer"), (14, 15, "optimizer"), (15, 19, "disk"),
             (19, 20, "optimizer")],
        ),
    ],
)  # fmt: skip
def test_a_wait_is_the_disks_where_no_update_thread_works(beside, expected):
    joined = []
    for part in cut(*beside):
        if joined and joined[-1][2] == part[2] and joined[-1][1] == part[0]:
            joined[-1] = (joined[-1][0], part[1], part[2])
        else:
            joined.append(part)
    wanted = []
    for part in expected:
        if wanted and wanted[-1][2] == part[2]:
            wanted[-1] = (wanted[-1][0], part[1], part[2])
        else:
            wanted.append(part)
    assert joined == wanted


def test_other_waits_are_left_as_they_are():
    for cause in (Cause.link, Cause.arithmetic, Cause.data):
        span = Span(COMPUTE, "weights", 1, 0.0, 1.0, cause)
        assert list(_blame_disk([span], [Span("disk 0", "read", 0, 0.0, 1.0)])) == [span]


class SlowFile(disk.DirectFile):
    def read(self, place, offset, into):
        time.sleep(0.005)
        super().read(place, offset, into)


@pytest.mark.parametrize("states", [["residual", "exp_avg*"], ["weights", "residual", "exp_avg*"]])
def test_a_slow_disk_shows_in_the_trace_and_in_the_split(states, tmp_path, monkeypatch):
    monkeypatch.setattr(nvme, "DirectFile", SlowFile)
    rules = [TierRule(state=state, tier=Tier.nvme) for state in states]
    memory = MemoryConfig(rules=rules, nvme_dir=str(tmp_path))
    with engine_for(build("llama"), memory=memory) as engine:
        engine.plan_micro_batch(2, 16)
        assert engine.plan.prediction.bound == "disk" and "bound by disk" in engine.plan.table()
        engine.step(plain(0))
        with engine.trace(tmp_path / "trace.json", picture=tmp_path / "trace.png") as recording:
            for seed in range(1, 4):
                engine.step(plain(seed))
            engine._runtime.wait_for_updates()
            engine.step(plain(4))
    split = recording.split
    parts = split.arithmetic_ms, split.link_ms, split.optimizer_ms, split.disk_ms, split.data_ms, split.launch_ms
    assert sum(parts) == pytest.approx(split.step_ms)
    assert split.disk_ms > max(split.optimizer_ms, 5)
    traffic = {t.what: t for t in split.traffic if t.direction == "disk"}
    assert traffic["write"].num_bytes == pytest.approx(traffic["write"].least_bytes, rel=0.3)  # steps overlap
    assert traffic["read"].num_bytes == pytest.approx(traffic["read"].least_bytes, rel=0.3)
    names = {event["args"]["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
             if event["name"] == "thread_name"}  # fmt: skip
    assert any(name.startswith("disk ") for name in names), names
    assert lanes([])  # the fixed ones
