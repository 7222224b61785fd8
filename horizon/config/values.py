"""Checks of what a caller hands to the library, and settings that follow from others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any, TypeVar

from horizon.config.schema import HorizonConfig
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


def with_batch_size(config: HorizonConfig) -> HorizonConfig:
    """The settings with `train.batch_size` as `train.tokens_per_step`, where it is given, wants it.

    Raises:
        ConfigError: not even one row has so few tokens, or rows are not packed and hold padding instead.
    """
    train = config.train
    if train.tokens_per_step is None:
        return config
    if not config.data.packing:
        raise ConfigError(
            "train.tokens_per_step counts the tokens of full rows, and with data.packing=false rows hold padding; set "
            "train.batch_size instead"
        )
    if train.tokens_per_step < train.seq_len:
        raise ConfigError(
            f"train.tokens_per_step={train.tokens_per_step} is less than a row of train.seq_len={train.seq_len}"
        )
    return replace(config, train=replace(train, batch_size=train.tokens_per_step // train.seq_len))


def require_defaults(settings: Any, group: str, other: str, names: Sequence[str]) -> None:
    """Raise a ConfigError for a setting of `group` that was changed although `other` has no use for it."""
    defaults = type(settings)()
    for name in names:
        value = getattr(settings, name)
        if value != getattr(defaults, name):
            raise ConfigError(f"{group}.{name}={value} has no use with {other}; leave it out")
