"""An adapter as peft's own folder: written so that `PeftModel.from_pretrained(base, folder)` loads it, and read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from horizon.checkpoint.conversion import as_meta
from horizon.checkpoint.model_folder import Tokenizer, written_folder
from horizon.checkpoint.shards import num_bytes, open_file, write_shard
from horizon.errors import CheckpointError
from horizon.models.adapters import saved_config, saved_form
from horizon.models.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def export_adapter(
    folder: str | Path,
    skeleton: PreTrainedModel,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
) -> None:
    """Write the adapter of a model, tensor by tensor, and its config; arguments and errors as `export_model`."""
    targets = saved_form(skeleton)
    content = {target: as_meta(skeleton.get_parameter(name).shape, dtype) for name, target in targets.items()}
    values = ((target, read(name).to(dtype)) for name, target in targets.items())
    with written_folder(folder, sum(map(num_bytes, content.values())), ADAPTER_CONFIG) as partial:
        write_shard(partial / ADAPTER_WEIGHTS, content, values)
        text = json.dumps(saved_config(skeleton), indent=2, sort_keys=True) + "\n"
        (partial / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))


def import_adapter(folder: Path, skeleton: PreTrainedModel, write: Callable[[str, Tensor], None]) -> None:
    """Call `write(name, tensor)` for every parameter of the adapter that a skeleton has.

    Raises:
        CheckpointError: the file is damaged, or its tensors are not those of the adapter.
    """
    targets = saved_form(skeleton)
    with open_file(folder / ADAPTER_WEIGHTS) as reader:
        if strange := sorted(set(reader.names()) ^ set(targets.values())):
            where = "is not in the adapter of" if strange[0] in reader.names() else "is missing for"
            raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: {strange[0]} {where} this model")
        for name, target in targets.items():
            found, expected = tuple(reader.meta(target).shape), tuple(skeleton.get_parameter(name).shape)
            if found != expected:
                raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: {target} has shape {found}, expected {expected}")
            write(name, reader.read(target))
