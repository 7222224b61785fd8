"""Weights of a Hugging Face folder into the host store, one tensor at a time.

Everything that headers can tell (names, shapes, dtypes) is checked before the first tensor is handed on, so a folder
that does not fit the model changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from horizon.checkpoint.adapter_files import import_adapter
from horizon.checkpoint.conversion import Group, import_groups
from horizon.checkpoint.shards import ShardReader, open_shards
from horizon.errors import CheckpointError, one_line
from horizon.models.adapters import Adapted, draw_adapter
from horizon.models.skeleton import init_parameters, tied_aliases

_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NUM_NAMED = 3  # names in an error message, of each kind of fault


def load_weights(
    weights: Any, skeleton: PreTrainedModel, write: Callable[[str, Tensor], None], device: torch.device, seed: int
) -> None:
    """Call `write(name, tensor)` for every parameter: from a folder, from a live model, or (None) with random values.

    Random values are drawn on `device`, those of a new adapter on the CPU. Errors are those of `import_weights`.
    """
    if isinstance(weights, Adapted):
        names = weights.names
        load_weights(weights.weights, weights.base, lambda name, value: write(names[name], value), device, seed)
        if weights.folder is not None:
            import_adapter(weights.folder, skeleton, write)
            return
        for name, value in draw_adapter(skeleton, seed):
            write(name, value)
        return
    if isinstance(weights, Path):
        import_weights(weights, skeleton, write)
        return
    named = init_parameters(skeleton, device=device, seed=seed) if weights is None else weights.named_parameters()
    for name, value in named:
        write(name, value)


def import_weights(folder: str | Path, skeleton: PreTrainedModel, write: Callable[[str, Tensor], None]) -> None:
    """Call `write(name, tensor)` once for every parameter, in fp32, fp16 or bf16 as stored; fill persistent buffers.

    `name` is the one `skeleton.named_parameters()` gives. Memory: one tensor; for experts that the model keeps
    merged, about twice the merged tensor while it is put together. An exception of `write` passes through.

    Raises:
        CheckpointError: files are missing or damaged, or their tensors do not match the skeleton's names, shapes
            and dtypes, or tied weights differ.
    """
    with open_shards(Path(folder)) as reader:
        groups = _plan(Path(folder), reader, skeleton)
        owner = tied_aliases(skeleton)
        buffers = dict(skeleton.named_buffers())
        for group in groups:
            for name, tensor in group.convert(reader.read, skeleton).items():
                if name in buffers:
                    buffers[name].copy_(tensor)
                else:
                    write(owner.get(name, name), tensor)
                del tensor  # before the next one is read


@dataclass(slots=True)
class _Faults:
    """What is wrong with a folder's tensors, by kind."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: list[str] = field(default_factory=list)
    wrong_dtype: list[str] = field(default_factory=list)

    def raise_if_any(self, folder: Path, model: PreTrainedModel) -> None:
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.wrong_shape,
            "of a dtype that is not trained (expected fp32, fp16 or bf16)": self.wrong_dtype,
        }
        texts = [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names]
        if texts:
            raise CheckpointError(f"the weights in {folder} do not fit {type(model).__name__}: {'; '.join(texts)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NUM_NAMED]) + (", ..." if len(names) > _NUM_NAMED else "")


def _plan(folder: Path, reader: ShardReader, skeleton: PreTrainedModel) -> list[Group]:
    """The groups that give every parameter and persistent buffer exactly once, checked from headers."""
    faults = _Faults()
    made_by = _match(reader, skeleton, faults)
    owner = tied_aliases(skeleton)
    copies = [alias for alias in owner if alias in made_by and owner[alias] in made_by]
    given = {owner.get(name, name) for name in made_by}
    needed = (name for name in skeleton.state_dict() if owner.get(name, name) not in given)
    faults.missing = [name for name in needed if name not in owner and not _may_be_missing(name, skeleton)]
    faults.raise_if_any(folder, skeleton)
    for alias in copies:
        kept, dropped = made_by[owner[alias]], made_by.pop(alias)
        if not reader.equal(kept.sources[0][0], dropped.sources[0][0]):
            raise CheckpointError(
                f"{folder} holds different values for {owner[alias]} and {alias}, which the config ties; "
                "set tie_word_embeddings=false in its config.json"
            )
    return list({id(group): group for group in made_by.values()}.values())


def _match(reader: ShardReader, skeleton: PreTrainedModel, faults: _Faults) -> dict[str, Group]:
    """Name in the model -> the group that makes it; what does not match goes to `faults`."""
    state = skeleton.state_dict()
    made_by: dict[str, Group] = {}
    for group in import_groups(reader.names(), skeleton):
        try:
            made = group.convert(reader.meta, skeleton)
        except (RuntimeError, ValueError, IndexError) as error:  # such as experts of different sizes
            faults.wrong_shape.append(f"{group.target} (from {len(group.sources)} tensors: {one_line(error)})")
            made_by[group.target] = group
            continue
        if not made.keys() <= state.keys() or not made.keys().isdisjoint(made_by):
            if not _may_be_left_over(group.target, skeleton):
                faults.unexpected += (name for name, _ in group.sources)
            continue
        made_by |= dict.fromkeys(made, group)
        for name, tensor in made.items():
            if tensor.shape != state[name].shape:
                found, expected = list(tensor.shape), list(state[name].shape)
                faults.wrong_shape.append(f"{name} ({found} on disk, {expected} in the model)")
            if state[name].is_meta and tensor.dtype not in _WEIGHT_DTYPES:
                faults.wrong_dtype.append(f"{name} ({str(tensor.dtype).removeprefix('torch.')})")
    return made_by


def _may_be_missing(name: str, skeleton: PreTrainedModel) -> bool:
    """A buffer has its value from the model's code; a parameter has none."""
    is_buffer = not skeleton.state_dict()[name].is_meta
    return is_buffer and _matches(name, skeleton._keys_to_ignore_on_load_missing)


def _may_be_left_over(name: str, skeleton: PreTrainedModel) -> bool:
    """What transformers drops without a word: declared leftovers, and buffers that the model computes by itself."""
    computed = {buffer.rpartition(".")[2] for buffer, _ in skeleton.named_buffers()}
    is_old_buffer = name.rpartition(".")[2] in computed & {"inv_freq", "position_ids"}
    is_buffer = name in dict(skeleton.named_buffers())
    return is_old_buffer or is_buffer or _matches(name, skeleton._keys_to_ignore_on_load_unexpected)


def _matches(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())
