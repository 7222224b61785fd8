"""Bytes in and out of text: `24GiB` <-> 25769803776. GiB = 2**30 everywhere."""

from __future__ import annotations

import re
from decimal import Decimal

from horizon.errors import ConfigError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_FACTORS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": TIB, "tib": TIB, "tb": 1000**4,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str | int, key: str) -> int:
    """Number of bytes meant by `text` (`24GiB`, `512MB`, `1.5g`, `1000`); `key` names the setting in the error.

    Raises:
        ConfigError: the text is no size, or the size is zero.
    """
    match = _SIZE.fullmatch(str(text))
    factor = _FACTORS.get(match[2].lower()) if match else None
    num_bytes = int(Decimal(match[1]) * factor) if match and factor else 0
    if num_bytes <= 0:
        raise ConfigError(f"{key}={text!r} is not a size; expected 'auto' or a number with a unit, such as 24GiB")
    return num_bytes


def format_bytes(num_bytes: float) -> str:
    """`num_bytes` with a binary unit and three significant digits: `1.42 GiB`."""
    for unit, size in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= size:
            return (
                f"{num_bytes / size:.3g} {unit}" if abs(num_bytes) < 999.5 * size else f"{num_bytes / size:.0f} {unit}"
            )
    return f"{num_bytes:.0f} B"


def align_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def format_size(num_bytes: int) -> str:
    """`num_bytes` as a setting, rounded down: `24GiB`, or `512MiB` below ten GiB."""
    unit, name = (GIB, "GiB") if num_bytes >= 10 * GIB else (MIB, "MiB")
    return f"{num_bytes // unit}{name}" if num_bytes >= unit else f"{num_bytes}B"
