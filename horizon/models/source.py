"""Where a model is: a folder, or a hub id, which becomes one. Nothing of its code is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from horizon.errors import CheckpointError, one_line

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("model.safetensors", "model-*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer*", "*.model")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A local model folder."""

    folder: Path
    has_weights: bool  # False: only a config.json, the weights are to be drawn at random


def resolve_model(path: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """The folder that `path` means: an existing folder, or a hub id `org/name`, which is downloaded (and cached).

    Raises:
        CheckpointError: no such folder, no config.json in it, weights in a format that is not read, or the hub
            does not give the model.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return ModelSource(folder, _has_weights(folder))
    is_hub_id = _HUB_ID.fullmatch(path) is not None and not folder.parent.exists()
    if folder.exists() or not is_hub_id:
        found = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(f"no such folder: model.path={path!r} {found}; expected a folder or a hub id org/name")
    source = ModelSource(_download(path, revision, trust_remote_code), has_weights=True)
    if not _has_weights(source.folder):
        raise CheckpointError(f"the hub model {path!r} has no safetensors weights; name one that has")
    return source


def _has_weights(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
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
