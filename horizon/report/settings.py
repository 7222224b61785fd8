"""The settings of a run as a flat table, and which of them are not the defaults or not those of another run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from horizon.config.schema import HorizonConfig
from horizon.errors import DataError

Settings = dict[str, Any]  # by full key, such as optim.lr
FILES = "config.yaml", ".hydra/config.yaml"  # the run's own; Hydra's, of a run that was refused before it began
UNSET = "-"


def read_settings(folder: Path) -> Settings:
    """Of a run's folder; empty where it has none.

    Raises:
        DataError: the file is damaged.
    """
    for path in (folder / name for name in FILES):
        if path.is_file():
            try:
                return dict(_flat(yaml.safe_load(path.read_text(encoding="utf-8"))))
            except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
                raise DataError(f"{path} holds no settings ({' '.join(str(error).split())})") from error
    return {}


def changed(settings: Settings) -> list[tuple[str, str, str]]:
    """(key, value, default) of each setting that is not the default."""
    defaults = dict(_flat(dataclasses.asdict(HorizonConfig())))
    return [
        (key, show(value), show(defaults[key]) if key in defaults else UNSET)
        for key, value in settings.items()
        if key not in defaults or value != defaults[key]
    ]


def differing(runs: Sequence[Settings]) -> list[str]:
    """Keys whose values are not the same in all runs that have settings."""
    known = [settings for settings in runs if settings]
    keys = dict.fromkeys(key for settings in known for key in settings)
    return [key for key in keys if len({show(settings.get(key, UNSET)) for settings in known}) > 1]


def show(value: Any) -> str:
    """As it is written in YAML and on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flat(node: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in node.items():
        full = f"{prefix}{key}"
        found += _flat(value, f"{full}.") if isinstance(value, Mapping) and value else [(full, value)]
    return found
