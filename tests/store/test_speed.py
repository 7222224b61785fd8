"""The disk's speed is tried on the tier itself, which is as it was afterwards."""

import time

import pytest
import torch

from horizon.config.schema import NvmeEngine, Tier
from horizon.layout import ParamSpec, place_block
from horizon.store import nvme
from horizon.store.disk import DirectFile
from horizon.store.host import HostStore
from horizon.store.speed import probe_disk

LAYOUT = place_block(0, "block", [ParamSpec("w", "w", (300, 1000))])
PLACED = {(name, 0): Tier.nvme for name in ("weights", "residual", "exp_avg", "exp_avg_sq")}


@pytest.fixture(autouse=True)
def forget():
    probe_disk.cache_clear()
    MOVED[:] = [0, 0]


MOVED = [0, 0]  # read, written


class Counting(DirectFile):
    """Takes its time to read, and counts bytes."""

    def read(self, place, offset, into):
        time.sleep(0.01)
        MOVED[0] += len(into)
        super().read(place, offset, into)

    def write(self, place, offset, data):
        MOVED[1] += len(data)
        super().write(place, offset, data)


@pytest.mark.parametrize("engine", ["direct", "tensorstore"])
def test_states_are_zero_before_and_after(engine, tmp_path):
    store = HostStore([LAYOUT], False, False, placed=PLACED, nvme_dir=str(tmp_path), nvme_engine=NvmeEngine(engine))
    try:
        rates = store.measure_disk()
        assert rates.read > 1e6 and rates.write > 1e6
        for name in ("weights", "residual", "exp_avg", "exp_avg_sq"):
            assert not store.read_state(name, 0).view(torch.uint8).any()
    finally:
        store.close()


def test_without_states_on_disk_nothing_is_measured():
    store = HostStore([LAYOUT], False, False)
    assert store.measure_disk() is None
    store.close()


def test_reads_and_writes_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(nvme, "DirectFile", Counting)
    rates = probe_disk(str(tmp_path), NvmeEngine.auto, 32 << 20)  # two pieces of 16 MiB, at once
    assert rates.read < (32 << 20) / 0.01
    assert MOVED == [2 * (32 << 20), 4 * (32 << 20)]  # writes begin a file, and leave zeros there
    assert list(tmp_path.iterdir()) == []
    assert probe_disk(str(tmp_path), NvmeEngine.auto, 32 << 20) is rates


def test_a_disk_that_cannot_be_tried_has_no_speed(tmp_path, caplog):
    assert probe_disk(str(tmp_path / "missing"), NvmeEngine.direct) is None
    assert "the disk's speed is not known: memory.nvme_dir=" in caplog.text


def test_no_more_is_moved_than_a_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("horizon.store.speed.SAMPLE", 1 << 20)
    monkeypatch.setattr(nvme, "DirectFile", Counting)
    store = HostStore([LAYOUT], False, False, placed=PLACED, nvme_dir=str(tmp_path))
    store.measure_disk()
    store.close()
    assert MOVED == [2 << 20, 4 << 20]
