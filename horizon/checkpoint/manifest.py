"""The manifest: what a checkpoint holds and where its run stood, a small JSON file that makes the checkpoint whole.

    {"format": "horizon-checkpoint", "schema": 3, "checksum": SHA-256 of the content, "content": {...}}

The checksum is that of the content written without spaces and with sorted keys, so that it does not depend on how the
file is laid out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from horizon.checkpoint.format import DTYPES, MANIFEST, ArraySpec
from horizon.config.schema import MasterFormat
from horizon.errors import CheckpointError
from horizon.plan.states import MOMENTS

FORMAT, SCHEMA = "horizon-checkpoint", 3
NO_ADAPTER = 2  # an earlier schema, the same without `adapter`: there was none
SPLIT_ONLY = 1  # and without the `master` of `optimizer`, which was always split
_KINDS = {"master", "buffer", *(state.name for states in MOMENTS.values() for state in states)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of a manifest; the attributes are its keys."""

    horizon: str  # version of the writer
    time: float  # when the states were those of the checkpoint, seconds since 1970
    model: dict[str, Any]  # the transformers config
    model_class: str
    generation: dict[str, Any] | None = None  # the transformers generation config
    adapter: dict[str, Any] | None = None  # peft's settings of the LoRA adapter; None: the model has none
    step: int = 0  # optimizer steps that the weights have seen
    passes: int = 0  # backward passes so far, each with dropout masks of its own
    seed: int = 0
    last_norm: float | None = None  # of the gradients of the step applied last, before clipping
    optimizer: dict[str, Any] | None = None  # see `restore.optimizer_facts`; None: weights only
    frozen: list[str] = field(default_factory=list)  # parameters that are not trained
    run: dict[str, Any] = field(default_factory=dict)  # whatever the caller of the save wants to have back
    arrays: list[ArraySpec] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(spec.num_bytes for spec in self.arrays)

    def to_json(self) -> str:
        """The file's text."""
        content = {key: getattr(self, key) for key in self.__slots__}
        content["arrays"] = [
            {"name": a.name, "kind": a.kind, "shape": list(a.shape), "dtype": a.dtype, "bytes": a.num_bytes}
            for a in self.arrays
        ]
        whole = {"format": FORMAT, "schema": SCHEMA, "checksum": checksum(content), "content": content}
        return json.dumps(whole, indent=1, allow_nan=False) + "\n"


def checksum(content: dict[str, Any]) -> str:
    """SHA-256 of the content, in hexadecimal digits."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or another version of Horizon is needed to read it.
    """
    path = folder / MANIFEST
    try:
        whole = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} is no checkpoint: it has no {MANIFEST}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # truncated, or not text
        raise CheckpointError(f"{path} is truncated or damaged: {error}; use an earlier checkpoint") from error
    if not isinstance(whole, dict) or whole.get("format") != FORMAT or not isinstance(whole.get("content"), dict):
        raise CheckpointError(f"{path} is not a manifest of a Horizon checkpoint")
    if whole.get("schema") not in (SPLIT_ONLY, NO_ADAPTER, SCHEMA):
        raise CheckpointError(
            f"{path} has schema {whole.get('schema')!r} and this Horizon reads {SCHEMA}; use the version that wrote it "
            f"({whole['content'].get('horizon')})"
        )
    try:
        if whole.get("checksum") != checksum(whole["content"]):
            raise CheckpointError(f"{path} is damaged: its checksum does not match; use an earlier checkpoint")
        return _from_content(whole["content"], whole["schema"])
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}; use an earlier checkpoint") from error


def _from_content(content: dict[str, Any], schema: int) -> Manifest:
    names = {item.name for item in dataclasses.fields(Manifest)}
    if schema <= NO_ADAPTER:
        content["adapter"] = None
    if content.keys() != names:
        raise ValueError(f"keys {sorted(content.keys() ^ names)}")
    if schema == SPLIT_ONLY and content["optimizer"] is not None:
        content["optimizer"]["master"] = str(MasterFormat.split)
    return Manifest(**{**content, "arrays": [_array(entry) for entry in content["arrays"]]})


def _array(entry: dict[str, Any]) -> ArraySpec:
    """Checked, as parts of places on disk are made from it."""
    spec = ArraySpec(entry["name"], entry["kind"], tuple(entry["shape"]), entry["dtype"])
    sizes = all(isinstance(size, int) and size >= 0 for size in spec.shape)
    if spec.kind not in _KINDS or spec.dtype not in DTYPES or not isinstance(spec.name, str) or not sizes:
        raise ValueError(f"array {entry}")
    if spec.num_bytes != entry["bytes"]:
        raise ValueError(f"array {spec.name} {spec.kind} of {entry['bytes']} bytes")
    return spec
