"""A trained adapter as peft's own folder, which `peft.PeftModel.from_pretrained(base, folder)` loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from horizon.checkpoint.conversion import as_meta
from horizon.checkpoint.model_folder import Tokenizer, written_folder
from horizon.checkpoint.shards import num_bytes, write_shard
from horizon.models.adapters import CONFIG, WEIGHTS, saved_config, saved_form


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
    with written_folder(folder, sum(map(num_bytes, content.values())), CONFIG) as partial:
        write_shard(partial / WEIGHTS, content, ((target, read(name).to(dtype)) for name, target in targets.items()))
        text = json.dumps(saved_config(skeleton), indent=2, sort_keys=True) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
