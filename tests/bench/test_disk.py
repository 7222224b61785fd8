import errno
import os

import numpy as np
import pytest

from horizon.bench import disk as module
from horizon.bench.disk import disk
from horizon.errors import DataError
from horizon.units import KIB, MIB


def measure(folder):
    return list(disk(folder, 2 * MIB, (1, 2), (64 * KIB, MIB), repeats=2, seconds=0.2))


def test_rows_by_access_depth_and_block_and_no_file_is_left(tmp_path):
    rows = measure(tmp_path)
    keys = {(row.settings["access"], row.settings["depth"], row.settings["block"]) for row in rows}
    assert keys == {(a, d, b) for a in ("read", "write") for d in (1, 2) for b in (64 * KIB, MIB)}
    assert all(row.n == 2 and row.best >= row.median > 0 for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_direct_io_is_measured_and_told(tmp_path, monkeypatch):
    plain = os.open

    def refuse(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(path, flags, *mode)

    monkeypatch.setattr(module.os, "open", refuse)
    assert {row.settings["io"] for row in measure(tmp_path)} == {"buffered"}


@pytest.mark.parametrize("access", ["read", "write"])
def test_an_error_of_the_disk_is_told_and_no_file_is_left(tmp_path, monkeypatch, access):
    real = module.requests

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module, "requests", lambda name: (lambda *_: 0) if name == access else real(name))
    monkeypatch.setattr(module.os, "preadv" if access == "read" else "pwrite", broken)
    if access == "write":
        monkeypatch.setattr(module, "create_file", lambda folder, size: (os.open(os.devnull, os.O_RDWR), True))
    with pytest.raises(
        DataError, match=r"cannot measure the disk in .*: Input/output error; choose another with --disk"
    ):
        measure(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_short_read_is_an_error(tmp_path, monkeypatch):
    real, made = module.create_file, module.requests

    def cut(folder, num_bytes):
        handle, direct = real(folder, num_bytes)
        os.ftruncate(handle, num_bytes // 2)
        return handle, direct

    monkeypatch.setattr(module, "create_file", cut)
    monkeypatch.setattr(module, "requests", lambda name: made(name) if name == "read" else (lambda *given: given[-1]))
    with pytest.raises(DataError, match="0 of 65536 bytes were moved"):
        measure(tmp_path)


@pytest.mark.parametrize("access", ["read", "write"])
def test_requests_move_the_bytes_that_they_name_and_stop_at_the_first_that_is_cut(tmp_path, access):
    content = bytes(i // 64 for i in range(64 * 10)) if access == "read" else bytes(64 * 10)
    (tmp_path / "f").write_bytes(content)
    handle, buffer = os.open(tmp_path / "f", os.O_RDWR), np.full(64, 77, dtype=np.uint8)
    make = module.requests(access)
    assert make(handle, buffer.ctypes.data, 64, 64, 128, 3) == 3
    if access == "read":
        assert list(buffer) == [5] * 64  # the last of 1, 3, 5
        assert make(handle, buffer.ctypes.data, 64, 8 * 64, 64, 5) == 2
    else:
        written = (tmp_path / "f").read_bytes()
        assert [i for i in range(10) if written[64 * i] == 77] == [1, 3, 5]
    os.close(handle)
    assert make(handle, buffer.ctypes.data, 64, 0, 64, 5) == 0


def test_buffers_are_made_before_the_clock_runs(tmp_path, monkeypatch):
    made = []
    real = module.make_buffer
    monkeypatch.setattr(module, "make_buffer", lambda size: made.append(size) or real(size))
    handle, direct = module.create_file(tmp_path, MIB)
    made.clear()
    module._rate(handle, "write", [real(64 * KIB)] * 2, MIB, direct, 1)
    os.close(handle)
    assert made == []


def test_an_interrupt_leaves_neither_threads_nor_a_file(tmp_path, monkeypatch):
    join, calls = module.threading.Thread.join, []

    def interrupted(thread, *args):
        calls.append(thread)
        if len(calls) == 1:
            raise KeyboardInterrupt
        join(thread, *args)

    before = module.threading.active_count()
    monkeypatch.setattr(module.threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(disk(tmp_path, 64 * MIB, (4,), (4 * KIB,), repeats=1, seconds=30))
    assert module.threading.active_count() == before
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="No such file or directory"):
        measure(tmp_path / "none")
