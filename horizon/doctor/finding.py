"""What a check of the machine found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How bad it is."""

    ok = "ok"
    warn = "warn"  # slower or smaller than it could be
    fail = "fail"  # training does not work as it is


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `horizon doctor`."""

    name: str
    status: Status
    found: str
    fix: str = ""  # what to do; empty where nothing is wrong


def ok(name: str, found: str) -> Finding:
    """All is well."""
    return Finding(name, Status.ok, found)


def warn(name: str, found: str, fix: str) -> Finding:
    """It works, but not as well as it could."""
    return Finding(name, Status.warn, found, fix)


def fail(name: str, found: str, fix: str) -> Finding:
    """It does not work."""
    return Finding(name, Status.fail, found, fix)
