import errno
import os

import pytest

from horizon.bench import nvme as module
from horizon.bench.nvme import PAGE, Raw, nvme
from horizon.errors import DataError, TierError
from horizon.store.disk import PIECE
from horizon.store.nvme import NvmeTier
from horizon.store.zarr import has_tensorstore

ENGINES = ["raw", "direct", *(["tensorstore"] if has_tensorstore() else [])]
SIZE = 2 * PAGE


def test_each_engine_is_measured_beside_raw_access_and_no_file_is_left(tmp_path):
    rows = list(nvme(tmp_path, SIZE, repeats=2))
    assert [(row.settings["engine"], row.settings["access"]) for row in rows] == [
        (engine, access) for engine in ENGINES for access in ("read", "write", "both")
    ]
    assert all(row.n == 2 and row.best >= row.median > 0 and row.also["cores"] >= 0 for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_shares_are_of_raw_and_both_ways_count_twice(tmp_path, monkeypatch):
    seconds = {"raw": 1.0, "direct": 2.0, "tensorstore": 4.0}
    monkeypatch.setattr(
        module,
        "_times",
        lambda parts, repeats: {
            (part.name, access): [(seconds[part.name], 0.5)] * repeats for part in parts for access in module.WRITES
        },
    )
    rows = {(row.settings["engine"], row.settings["access"]): row for row in nvme(tmp_path, SIZE, repeats=3)}
    assert rows["raw", "read"].median == SIZE / 1e9 and rows["raw", "both"].median == 2 * SIZE / 1e9
    assert rows["direct", "both"].also == {"of_raw": 0.5, "cores": 0.5}


def test_every_byte_goes_to_the_disk_and_comes_from_it(tmp_path, monkeypatch):
    moved: dict[str, list[tuple[int, int]]] = {"read": [], "write": []}
    read, write = os.preadv, os.pwritev

    def counted(kind, call):
        def move(handle, buffers, offset):
            moved[kind].append((offset, sum(map(len, buffers))))
            return call(handle, buffers, offset)

        return move

    monkeypatch.setattr(module.os, "preadv", counted("read", read))
    monkeypatch.setattr(module.os, "pwritev", counted("write", write))
    raw = Raw(tmp_path, SIZE, 2)
    raw.move((False, True))
    raw.close()
    whole = [(start, PIECE) for start in range(0, SIZE, PIECE)]
    assert sorted(moved["read"]) == sorted(moved["write"]) == whole


def test_a_file_system_without_direct_io_has_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "takes_direct", lambda folder: False)
    (skipped,) = nvme(tmp_path, SIZE, repeats=1)
    assert skipped.test == "nvme" and "refuses direct I/O" in skipped.reason


def test_a_full_disk_is_told_and_no_file_is_left(tmp_path, monkeypatch):
    def full(handle, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"cannot measure the disk .* No space left on device; choose another"):
        list(nvme(tmp_path, SIZE, repeats=1))
    assert list(tmp_path.iterdir()) == []


def test_a_short_call_is_an_error(tmp_path, monkeypatch):
    raw, write = Raw(tmp_path, SIZE, 1), os.pwritev
    monkeypatch.setattr(module.os, "pwritev", lambda handle, buffers, at: write(handle, buffers, at) - 1)
    with pytest.raises(OSError, match="bytes at 0 were moved"):
        raw.move((True,))
    raw.close()


def test_what_an_engine_cannot_do_is_told_and_no_file_is_left(tmp_path, monkeypatch):
    def lost(self, moves, done):
        done(TierError("the disk is gone"))

    monkeypatch.setattr(NvmeTier, "start", lost)
    with pytest.raises(TierError, match="the disk is gone"):
        list(nvme(tmp_path, SIZE, repeats=1))
    assert list(tmp_path.iterdir()) == []
