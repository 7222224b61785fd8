"""The shape of the model that settings name: taken from its code once, then kept, for that code takes seconds to load.

What is kept is found by all that it follows from: the model's config, what of it is frozen, the versions of the
libraries and the code here that looks at them. A damaged file is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import horizon.layout
import horizon.models
from horizon import __version__
from horizon.config.schema import HorizonConfig
from horizon.data.tokenizer import given_tokenizer
from horizon.errors import ConfigError
from horizon.forecast.kept import kept_folder, key_of, write_kept
from horizon.layout import BlockLayout, Borrowed, ParamSpec, place_block
from horizon.models.shape import ModelShape, shape_of
from horizon.models.source import resolve_model
from horizon.models.work import LayerWork, ModelWork

LIBRARIES = "torch", "transformers", "peft"


def open_shape(config: HorizonConfig) -> ModelShape:
    """The shape of the model that the settings name; no weights are read.

    Raises:
        HorizonError: it cannot be read or trained, as when training it.
    """
    model, folders = config.model, []  # type: Any, list[Path]
    if model.path is None and not model.config:
        raise ConfigError("no model: set model.path to a folder or hub id, or choose model=tiny_llama")
    described = model.path or {"vocab_size": _vocabulary(config), **model.config}
    if model.path is not None:
        source = resolve_model(model.path, model.revision, model.trust_remote_code)
        folders = [folder for folder in (source.folder, source.adapter) if folder is not None]
    if model.trust_remote_code:  # which may change, and need not be in the folder
        return _look(described, config)
    origin = _origin(folders, None if folders else described, config)
    path = kept_folder() / "shapes" / f"{key_of(origin)}.json"
    kept = _read(path)
    if kept is None:
        kept = _look(described, config)
        with contextlib.suppress(OSError):  # then it takes as long the next time
            write_kept(path, _to_text(kept))
    return kept


def _look(described: str | Mapping[str, Any], config: HorizonConfig) -> ModelShape:
    """Take the model apart."""
    from horizon.models.blocks import BlockModel  # here: both load transformers
    from horizon.models.skeleton import Unloaded, open_model

    model = config.model
    adapter = None if model.lora.rank is None else model.lora
    skeleton, _ = open_model(Unloaded(described), model.revision, model.trust_remote_code, adapter)
    return shape_of(BlockModel(skeleton, model.freeze))


def _vocabulary(config: HorizonConfig) -> int:
    """Entries of the tokenizer that a model gets which says nothing of its vocabulary."""
    tokenizer = given_tokenizer(config.data.tokenizer, None)
    return config.data.vocab_size if tokenizer is None else len(tokenizer)


def _origin(folders: list[Path], described: Any, config: HorizonConfig) -> Iterator[str]:
    """All that a shape follows from."""
    yield __version__
    yield from (_version(library) for library in LIBRARIES)
    yield from map(_digest, [Path(horizon.layout.__file__), *sorted(Path(horizon.models.__path__[0]).glob("*.py"))])
    yield json.dumps([list(config.model.freeze), dataclasses.asdict(config.model.lora), described], default=str)
    for folder in folders:
        yield from map(_digest, sorted(folder.glob("*config*.json")))


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def _digest(file: Path) -> str:
    return f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}"


# ---- as text: one line of JSON, behind a digest of it


def _read(path: Path) -> ModelShape | None:
    """What the file says, or None where there is none or it is damaged."""
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, ValueError):
        return None
    return _from_json(json.loads(text)) if digest == key_of([text]) else None


def _to_text(shape: ModelShape) -> str:
    text = json.dumps(_to_json(shape))
    return f"{key_of([text])}\n{text}"


def _to_json(shape: ModelShape) -> dict[str, Any]:
    def place(borrowed: Borrowed) -> tuple[str, int, int]:
        return borrowed.local_name, borrowed.owner, shape.layouts[borrowed.owner].params.index(borrowed.param)

    def block(layout: BlockLayout) -> dict[str, Any]:
        return {
            "name": layout.name,
            "params": [dataclasses.asdict(param.spec) for param in layout.params],
            "borrowed": [place(borrowed) for borrowed in layout.borrowed],
        }

    rest = {name: getattr(shape, name) for name in ("architecture", "max_positions", "buffer_bytes")}
    return rest | {"blocks": [block(layout) for layout in shape.layouts], "work": dataclasses.asdict(shape.work)}


def _from_json(found: dict[str, Any]) -> ModelShape:
    layouts: list[BlockLayout] = []
    for index, block in enumerate(found.pop("blocks")):
        specs = [ParamSpec(**spec | {"shape": tuple(spec["shape"])}) for spec in block["params"]]
        borrowed = [(name, owner, layouts[owner].params[place]) for name, owner, place in block["borrowed"]]
        layouts.append(place_block(index, block["name"], specs, borrowed))
    work = found.pop("work")
    layers = tuple(LayerWork(**layer) for layer in work.pop("layers"))
    return ModelShape(layouts=tuple(layouts), work=ModelWork(layers=layers, **work), **found)
