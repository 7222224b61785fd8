"""What two checkpoints have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch

from horizon.checkpoint.format import ArraySpec
from horizon.checkpoint.manifest import Manifest
from horizon.checkpoint.reader import Checkpoint
from horizon.checkpoint.restore import differences

_SKIPPED = {"arrays", "time", "horizon", "model", "optimizer", "run"}


def manifest_differences(one: Manifest, other: Manifest) -> list[str]:
    """A line for every fact that differs: `key: A in the first, B in the second`."""
    first, second = ({k: v for k, v in asdict(m).items() if k not in _SKIPPED} for m in (one, other))
    lines = [*differences("", first, second), *differences("model.config.", one.model, other.model)]
    lines += differences("optim.", one.optimizer or {}, other.optimizer or {})
    lines += differences("run.", one.run, other.run)
    return [line.replace("when it was saved", "in the first").replace(" now", " in the second") for line in lines]


def array_differences(one: Checkpoint, other: Checkpoint) -> Iterator[tuple[ArraySpec, str]]:
    """(array, how it differs) for every array that is not the same, bit for bit, in both.

    Raises:
        CheckpointError: an array is damaged.
    """
    known = {(spec.name, spec.kind): spec for spec in other.manifest.arrays}
    for spec in one.manifest.arrays:
        twin = known.pop((spec.name, spec.kind), None)
        if twin is None:
            yield spec, "only in the first"
        elif (twin.shape, twin.dtype) != (spec.shape, spec.dtype):
            yield spec, f"{spec.dtype} {list(spec.shape)} in the first, {twin.dtype} {list(twin.shape)} in the second"
        elif (text := _compare(one, other, spec)) is not None:
            yield spec, text
    for spec in known.values():
        yield spec, "only in the second"


def _compare(one: Checkpoint, other: Checkpoint, spec: ArraySpec) -> str | None:
    different, largest, total = 0, 0.0, 0
    pairs = zip(one.chunks(spec.name, spec.kind), other.chunks(spec.name, spec.kind), strict=True)
    for (_, a), (_, b) in pairs:
        unequal = (a.view(torch.uint8) != b.view(torch.uint8)).view(a.numel(), -1).any(1)
        different, total = different + int(unequal.sum()), total + a.numel()
        if a.numel():
            largest = max(largest, float((a.double() - b.double()).abs().max()))
    return f"{different} of {total} numbers differ, by up to {largest:.3g}" if different else None
