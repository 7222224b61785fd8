"""Composes `conf/` (and the user's own folders) onto the typed schema with Hydra.

The library takes the dataclasses of `horizon.config.schema` directly; machine files are read here, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from horizon.config.machine import MachineFile
from horizon.config.schema import HorizonConfig
from horizon.config.values import with_batch_size
from horizon.errors import ConfigError, HorizonError

CONFIG_NAME = "config"
SCHEMA_NAME = "horizon_schema"


def conf_dir() -> Path:
    """The folder of configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def compose(overrides: list[str]) -> HorizonConfig:
    """The settings that `overrides` ask for, without running anything.

    Raises:
        ConfigError: an unknown key or group, or a value of the wrong type.
    """
    _register_schema()
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return to_config(hydra.compose(CONFIG_NAME, overrides), overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise _as_config_error(error) from error


def machine_names() -> list[str]:
    """The machines that Horizon brings along."""
    return sorted(path.stem for path in (conf_dir() / "machine").glob("*.yaml"))


def load_machine(name: str) -> MachineFile:
    """The machine that a file describes, or one that Horizon brings along.

    Raises:
        ConfigError: there is no such file, or it does not hold a machine; names the key.
    """
    path = Path(name).expanduser()
    if name in machine_names():
        path = conf_dir() / "machine" / f"{name}.yaml"
    elif not path.is_file():
        raise ConfigError(
            f"machine={name}: no such file; expected a machine file, or one of {', '.join(machine_names())}"
        )
    try:
        machine = OmegaConf.to_object(OmegaConf.merge(MachineFile, OmegaConf.load(path)))
    except (OmegaConfBaseException, OSError, ValueError, YAMLError) as error:
        raise ConfigError(f"machine={name}: {_as_config_error(error)}") from error
    assert isinstance(machine, MachineFile)
    return machine


def dump_machine(machine: MachineFile) -> str:
    """A machine as a file's text."""
    return OmegaConf.to_yaml(OmegaConf.structured(machine))


def run_with_hydra(
    task: Callable[[HorizonConfig, Path, str], Any],
    arguments: list[str],
    on_error: Callable[[HorizonError, Path], None],
    on_sweep_end: Callable[[Path], None],
) -> None:
    """Hand `arguments` to Hydra, which calls `task(config, output_dir, command)` once, or for each run of a sweep.

    `command` is what begins that run again in its folder, but for `resume`. A named error of a run goes to `on_error`,
    with its folder, and the runs after it still take place. When a sweep has ended, however it did, `on_sweep_end` gets
    its folder.

    Raises:
        ConfigError: an unknown key or group, or a value of the wrong type.
    """
    _register_schema()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints errors itself and exits before they reach the caller
    if hasattr(argparse.ArgumentParser, "_check_help"):  # Python 3.14 refuses the lazy help text of Hydra's own parser
        setattr(argparse.ArgumentParser, "_check_help", lambda parser, action: None)  # noqa: B010

    sweeps: list[Path] = []

    def job(composed: DictConfig) -> Any:
        settings = HydraConfig.get()
        folder = Path(settings.runtime.output_dir)
        if settings.mode is RunMode.MULTIRUN:
            sweeps.append(Path(settings.sweep.dir))
        try:
            return task(to_config(composed, settings.overrides.task), folder, _command(settings))
        except HorizonError as error:  # caught here because Hydra adds lines of its own to what passes through it
            on_error(error, folder)
            return None

    sys.argv[1:] = arguments
    try:
        hydra.main(config_path=str(conf_dir()), config_name=CONFIG_NAME, version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise _as_config_error(error) from error
    finally:
        if sweeps:
            on_sweep_end(sweeps[0])


def _command(settings: Any) -> str:
    """What is typed to begin a run again, from what Hydra says of it."""
    folders = [s.path for s in settings.runtime.config_sources if s.provider == "command-line"]
    name = [] if settings.job.config_name == CONFIG_NAME else ["--config-name", settings.job.config_name]
    left_out = ("resume=", "resume_weights_only=")
    words = [word for word in settings.overrides.task if not word.lstrip("+").startswith(left_out)]
    flags = [word for folder in folders for word in ("--config-dir", folder)]
    folder = f"hydra.run.dir={_relative(Path(settings.runtime.output_dir), Path(settings.runtime.cwd))}"
    return shlex.join(["horizon", "train", *flags, *name, *words, folder])


def _relative(path: Path, folder: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def to_config(composed: DictConfig, overrides: Iterable[str]) -> HorizonConfig:
    """The typed settings of a composed tree; `model.path` replaces the preset's `model.config`.

    Raises:
        ConfigError: a setting without a value, or both `model.path` and a key of `model.config` given.
    """
    try:
        # merged once more because `+key=value` adds to a composed tree what the schema does not have
        config = OmegaConf.to_object(OmegaConf.merge(HorizonConfig, OmegaConf.to_container(composed)))
    except OmegaConfBaseException as error:
        raise _as_config_error(error) from error
    assert isinstance(config, HorizonConfig)
    if config.model.path is not None:
        unused = [text for text in overrides if text.lstrip("+~").startswith("model.config")]
        if unused:
            raise ConfigError(f"{unused[0]} has no use beside model.path={config.model.path}; remove one of the two")
        config.model.config = {}
    return with_batch_size(config)


def _register_schema() -> None:
    ConfigStore.instance().store(name=SCHEMA_NAME, node=HorizonConfig)


def _as_config_error(error: Exception) -> ConfigError:
    """One line out of the several that Hydra and OmegaConf give, with the key's full name and a near one."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if not isinstance(cause, OmegaConfBaseException) or not cause.full_key:
        return ConfigError(_one_line(str(error)))
    message = _one_line(str(cause))
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return ConfigError(f"{cause.full_key} is no setting; {_alternatives(cause, cause.full_key)}")
    return ConfigError(f"{cause.full_key}: {message}")


def _one_line(text: str) -> str:
    """The lines of a message up to the details that only a developer of Hydra needs."""
    message = ""
    for line in text.splitlines():
        if line.strip().startswith(("Config search path", "full_key:")):
            break
        separator = "" if not message else " " if message.endswith(":") else "; "
        message += separator + line.strip() if line.strip() else ""
    return message


def _alternatives(cause: OmegaConfBaseException, full_key: str) -> str:
    """What the node of an unknown key does hold, as the end of a sentence."""
    if not dataclasses.is_dataclass(cause.object_type):
        return f"to add it to what is there, write +{full_key}=..."
    parent = full_key.rpartition(".")[0]
    names = [field.name for field in dataclasses.fields(cause.object_type)]
    near = difflib.get_close_matches(str(cause.key), names, n=1)
    if near:
        return f"did you mean {parent}.{near[0]}?" if parent else f"did you mean {near[0]}?"
    return f"{parent or 'the top level'} has {', '.join(names)}"
