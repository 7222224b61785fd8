"""The trained model as a Hugging Face folder, in the names and files that transformers itself would write."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from horizon.checkpoint.adapter_files import export_adapter
from horizon.checkpoint.conversion import Group, as_meta, export_groups
from horizon.checkpoint.model_folder import Tokenizer, written_folder
from horizon.checkpoint.shards import num_bytes, write_shard
from horizon.models.adapters import adapter_of
from horizon.models.skeleton import tied_aliases
from horizon.models.source import CONFIG, WEIGHTS, WEIGHTS_INDEX
from horizon.units import GIB


def export_model(
    folder: str | Path,
    skeleton: PreTrainedModel,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_size: int = 4 * GIB,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; of a model with an adapter, peft's folder.

    `read(name)` gives a parameter, by its name in `skeleton.named_parameters()`, in any floating dtype and on any
    device; it is stored as `dtype` (parameters that the class keeps in fp32 stay so). Memory: one tensor, or the
    tensors that are split from one. An earlier model folder of that name is replaced; on failure it is left as it was.

    Raises:
        CheckpointError: the folder holds something else than a model, there is not enough room, or writing fails.
    """
    if adapter_of(skeleton) is not None:
        export_adapter(folder, skeleton, read, dtype, tokenizer)
        return
    metas = _stored_form(skeleton, dtype)
    shards = _split_into_shards(metas, skeleton, max_shard_size)
    buffers = dict(skeleton.named_buffers())

    def stored(name: str) -> Tensor:
        return buffers[name] if name in buffers else read(name).to(metas[name].dtype)

    with written_folder(folder, sum(shard.num_bytes for shard in shards), CONFIG) as partial:
        _write_weights(partial, shards, skeleton, stored)
        _write_configs(partial, skeleton, dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))


@dataclass(slots=True)
class _Shard:
    """One file to be: the groups it is made from and what they give (name -> meta tensor)."""

    groups: list[Group] = field(default_factory=list)
    content: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(num_bytes(meta) for meta in self.content.values())


def _stored_form(skeleton: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name in the model -> meta tensor of the dtype it is stored in, for all that goes to disk."""
    dropped = tied_aliases(skeleton).keys() | set(skeleton._keys_to_ignore_on_save or ())
    in_fp32 = [pattern.replace("*", ".*") for pattern in skeleton._keep_in_fp32_modules_strict or ()]

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        if not tensor.is_meta:
            return tensor.dtype  # a buffer
        return torch.float32 if any(re.search(pattern, name) for pattern in in_fp32) else dtype

    state = skeleton.state_dict()
    return {name: as_meta(t.shape, dtype_of(name, t)) for name, t in state.items() if name not in dropped}


def _split_into_shards(metas: dict[str, Tensor], skeleton: PreTrainedModel, max_shard_size: int) -> list[_Shard]:
    """Consecutive groups to a file, as many as fit; a group is never cut, so its sources are read once."""
    groups = export_groups(metas, skeleton)
    made = [(group, group.convert(metas.__getitem__, skeleton)) for group in groups]
    made.sort(key=lambda pair: -max(meta.element_size() for meta in pair[1].values()))  # wide first keeps all aligned
    shards = [_Shard()]
    size = 0
    for group, content in made:
        group_size = sum(num_bytes(meta) for meta in content.values())
        if size and size + group_size > max_shard_size:
            shards.append(_Shard())
            size = 0
        size += group_size
        shards[-1].groups.append(group)
        shards[-1].content |= content
    return shards


def _write_weights(
    folder: Path, shards: list[_Shard], skeleton: PreTrainedModel, stored: Callable[[str], Tensor]
) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        values = (pair for group in shard.groups for pair in group.convert(stored, skeleton).items())
        write_shard(folder / name, shard.content, values)
        weight_map |= dict.fromkeys(shard.content, name)
    if len(shards) > 1:
        total = sum(shard.num_bytes for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_configs(folder: Path, skeleton: PreTrainedModel, dtype: torch.dtype) -> None:
    config = copy.deepcopy(skeleton.config)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(skeleton).__name__]
    if skeleton.is_remote_code():
        custom_object_save(skeleton, str(folder), config=config)  # type: ignore[arg-type]  # the code that defines the class goes along
    config.save_pretrained(str(folder))
    generation_config = getattr(skeleton, "generation_config", None)
    if generation_config is not None:  # to_json_file, as save_pretrained refuses values that many hub models have
        generation_config.to_json_file(folder / "generation_config.json")
