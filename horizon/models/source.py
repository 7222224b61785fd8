"""Where a model's files are: a folder, what the hub gives for an id, or an adapter's folder and that of its base."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from horizon.errors import CheckpointError, one_line

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = (
    "model.safetensors",
    "adapter_model.safetensors",
    "model-*.safetensors",
    "*.json",
    "*.txt",
    "*.jinja",
    "tokenizer*",
    "*.model",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
ADAPTER_CONFIG = "adapter_config.json"  # in a folder of peft's
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A local model folder."""

    folder: Path
    has_weights: bool  # False: only a config.json, the weights are to be drawn at random
    adapter: Path | None = None  # the folder of an adapter, where that was named, whose base `folder` is

    @property
    def named(self) -> Path:
        """What was named: the model's folder, or the adapter's."""
        return self.adapter or self.folder

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer is, if it has one: an adapter's goes before that of its base."""
        beside = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return self.named if beside else self.folder


def resolve_model(path: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """The folder that `path` means: an existing folder, or a hub id `org/name`, which is downloaded (and cached).

    A folder of peft's with an adapter means that adapter on the base model that it names.

    Raises:
        CheckpointError: no such folder, no config.json in it, weights in a format that is not read, or the hub
            does not give the model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _source(folder, trust_remote_code)
    is_hub_id = _HUB_ID.fullmatch(path) is not None and not folder.parent.exists()
    if folder.exists() or not is_hub_id:
        found = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"no such folder: model.path={path!r} {found}; expected a folder or a hub id org/name")
    source = _source(_download(path, revision, trust_remote_code), trust_remote_code)
    if not source.has_weights:
        raise CheckpointError(f"the hub model {path!r} has no safetensors weights; name one that has")
    return source


def _source(folder: Path, trust_remote_code: bool) -> ModelSource:
    if (folder / CONFIG).is_file() or not (folder / ADAPTER_CONFIG).is_file():
        return ModelSource(folder, _has_weights(folder))
    from horizon.models.hf_config import read_json  # here: it loads transformers

    settings = read_json(folder / ADAPTER_CONFIG)
    base = settings.get("base_model_name_or_path")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"{folder} is an adapter without {ADAPTER_WEIGHTS}; save it as safetensors")
    if not base:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG} names no base model; set base_model_name_or_path in it")
    try:
        return replace(resolve_model(base, settings.get("revision"), trust_remote_code), adapter=folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} is an adapter of {base}, which is not to be had; set base_model_name_or_path in its "
            f"{ADAPTER_CONFIG} ({error})"
        ) from error


def _has_weights(folder: Path) -> bool:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} has no config.json; expected a Hugging Face model folder")
    if (folder / WEIGHTS).is_file() or (folder / WEIGHTS_INDEX).is_file():
        return True
    others = sorted(folder.glob("*.safetensors"))
    if others:
        raise CheckpointError(f"{folder} has {others[0].name} but neither {WEIGHTS} nor {WEIGHTS_INDEX}")
    pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern) if p.name != "training_args.bin")
    if pickles:
        raise CheckpointError(f"{folder / pickles[0]} is a pickle, which is not loaded; convert it to safetensors")
    return False


def _download(hub_id: str, revision: str | None, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download  # here: only a hub id needs it

    patterns = [*_HUB_FILES, "*.py"] if trust_remote_code else list(_HUB_FILES)
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns="*/*"))
    except Exception as error:  # network, authorization and disk errors of several libraries
        raise CheckpointError(
            f"model.path={hub_id!r} is no folder here and the hub did not give it: {one_line(error)}"
        ) from error
