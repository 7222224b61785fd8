"""Checks of what a caller hands to the library; what Hydra composes has been checked by its own types."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, TypeVar

from horizon.errors import ConfigError

T = TypeVar("T")
Choice = TypeVar("Choice", bound=StrEnum)


def choice(kind: type[Choice], value: str, name: str) -> Choice:
    """The member of `kind` that `value` names.

    Raises:
        ConfigError: there is none; lists those that there are.
    """
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r}: expected one of {', '.join(kind)}") from None


def settings(kind: type[T], value: Any, name: str) -> T:
    """`value`, or the defaults of `kind` where it is None.

    Raises:
        ConfigError: it is something else.
    """
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={value!r}: expected a horizon.{kind.__name__}")
    return value


def patterns(value: Any, name: str) -> tuple[str, ...]:
    """A list of name patterns.

    Raises:
        ConfigError: it is a single string, which would be taken letter by letter, or holds something else.
    """
    if isinstance(value, str) or not all(isinstance(pattern, str) for pattern in value):
        raise ConfigError(f"{name}={value!r}: expected a list of name patterns")
    return tuple(value)
