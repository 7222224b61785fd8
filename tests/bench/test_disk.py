import errno
import os

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


@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_an_error_of_the_disk_is_told_and_no_file_is_left(tmp_path, monkeypatch, call):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module.os, call, broken)
    with pytest.raises(
        DataError, match=r"cannot measure the disk in .*: Input/output error; choose another with --disk"
    ):
        measure(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_short_read_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module.os, "preadv", lambda handle, buffers, offset: 512)
    with pytest.raises(DataError, match="512 of 65536 bytes were moved"):
        measure(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="No such file or directory"):
        measure(tmp_path / "none")
