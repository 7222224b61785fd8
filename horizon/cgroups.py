"""The control groups that this process is in: containers and schedulers limit processor time and memory with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class MemoryGroup(NamedTuple):
    """One group that limits memory; bytes."""

    limit: int
    used: int  # without the part of the page cache that the kernel gives up first

    @property
    def room(self) -> int:
        """What may still be taken."""
        return max(0, self.limit - self.used)


def group_folders(controller: str, root: Path = ROOT, membership: Path = MEMBERSHIP) -> Iterator[Path]:
    """The folders of this process's groups for a controller, each followed by those above it, in either version.

    A container may see its own group as the root, and yet be told the path that the host knows it by: folders that do
    not exist are skipped.
    """
    for line in read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root  # version 1 mounts each controller in a folder of its own
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            if not folder.is_relative_to(base):
                break
            if folder.is_dir():
                yield folder


def memory_groups(root: Path = ROOT, membership: Path = MEMBERSHIP) -> list[MemoryGroup]:
    """All groups above this process that limit its memory."""
    found = []
    for folder in group_folders("memory", root, membership):
        for limit_file, used_file, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = read(folder / limit_file).strip(), read(folder / used_file).strip()
            if limit.isdigit() and used.isdigit():
                found.append(MemoryGroup(int(limit), max(0, int(used) - _entry(folder / "memory.stat", cache))))
    return found


def read(path: Path) -> str:
    """The file's text; empty where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _entry(path: Path, key: str) -> int:
    """The number beside `key` in a file of keys and numbers; 0 where there is none."""
    entries = dict(line.split(None, 1) for line in read(path).splitlines() if " " in line)
    value = entries.get(key, "0").strip()
    return int(value) if value.isdigit() else 0
