"""How tensors on disk become parameters and back, by transformers' own conversion tables.

A table renames tensors and, for some architectures, merges or splits them (the experts of a layer are many tensors
on disk and one parameter in the model). Tensors that are converted together form a `Group`; groups are independent, so
one group is all that ever needs to be in memory. Run on meta tensors, a group tells names and shapes before any read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)


@dataclass(slots=True)
class Group:
    """Tensors that are converted together."""

    target: str  # the (first) name they get
    converter: WeightConverter | None  # None: one tensor that is only renamed
    sources: list[tuple[str, str]] = field(default_factory=list)  # (name, pattern of the converter that it matched)

    def convert(self, read: Callable[[str], Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Target name -> tensor, from the sources that `read` gives; sources are dropped as soon as they are used."""
        if self.converter is None:
            return {self.target: read(self.sources[0][0])}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.target, name, pattern, read(name))  # type: ignore[arg-type]
        converted: dict[str, Any] = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def import_groups(names: Iterable[str], model: PreTrainedModel) -> list[Group]:
    """Groups that turn the tensors called `names` on disk into the model's; a target the model lacks is not checked."""
    table = get_model_conversion_mapping(model)
    renamings, converters = _split(table)
    state = model.state_dict()
    prefix = model.base_model_prefix

    def rename(name: str) -> tuple[str, str | None]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:  # already in the model's own form
            return rename_source_key(name, [], [], prefix, state)
        return target, pattern

    return _group(names, rename, converters)


def export_groups(names: Iterable[str], model: PreTrainedModel) -> list[Group]:
    """Groups that turn the model's tensors called `names` into those transformers writes to disk."""
    table = getattr(model, "_weight_conversions", None)  # of the files the instance was loaded from
    if table is None:
        table = get_model_conversion_mapping(model, add_legacy=False)
        table = [entry for entry in table if not isinstance(entry, PrefixChange)]
    renamings, converters = _split([entry.reverse_transform() for entry in reversed(table)])

    def rename(name: str) -> tuple[str, str | None]:
        return rename_source_key(name, renamings, converters, reverse=True)

    return _group(names, rename, converters)


def _split(table: list[WeightTransform]) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in table if isinstance(entry, WeightConverter)]


def _group(
    names: Iterable[str], rename: Callable[[str], tuple[str, str | None]], converters: list[WeightConverter]
) -> list[Group]:
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, Group] = {}
    renamed: list[Group] = []
    for name in sorted(names, key=dot_natural_key):  # expert 10 after expert 9; guards before what they guard
        target, pattern = rename(name)
        if pattern is None:
            renamed.append(Group(target, None, [(name, name)]))
        else:
            group = groups.setdefault(target, Group(target, by_pattern[pattern]))
            group.sources.append((name, pattern))
    return renamed + list(groups.values())


def as_meta(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """A tensor without storage, to ask a group what it would make."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")
