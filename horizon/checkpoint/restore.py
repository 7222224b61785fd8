"""From a checkpoint into the host store, whatever the store's placement and format of moments are.

Before anything is overwritten, what must be the same is compared: the model, what of it is trained, and the optimizer's
settings; each difference is named. Only the weights may be asked for alone. Moments in another format are converted
through fp32; into fewer bits they are rounded stochastically, as an update of the same step would round them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Set
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from horizon.checkpoint.arrays import Array, as_array
from horizon.checkpoint.format import MASTER_KIND
from horizon.checkpoint.reader import Checkpoint
from horizon.config.schema import Moments
from horizon.errors import CheckpointError
from horizon.layout import BlockLayout, Param
from horizon.models.adapters import saved_config
from horizon.optim.adamw import AdamW
from horizon.optim.moments import noise, random_bits, read_m, read_v, write_m, write_v
from horizon.plan.states import GROUP, MOMENTS
from horizon.store.host import HostStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Keys of a transformers config that do not change what the model computes.
_IDLE_KEYS = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "attn_implementation"
}  # fmt: skip
_IDLE_ADAPTER_KEYS = {"base_model_name_or_path", "revision", "peft_version", "task_type", "auto_mapping"}
_NUM_NAMED = 3
PIECE = 1 << 22  # masters that are split at a time: what does not lie in host memory takes as much beside the chunk

Write: TypeAlias = Callable[[str, int, Tensor], None]  # a block's numbers: state, first number, values


def optimizer_facts(optimizer: AdamW) -> dict[str, Any]:
    """The optimizer's settings as a manifest keeps them; the learning rate belongs to the step, not to the state."""
    beta1, beta2 = optimizer.betas
    return {
        "name": "adamw", "beta1": beta1, "beta2": beta2, "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay, "moments": str(optimizer.moments),
        "master": str(optimizer.master),
    }  # fmt: skip


def config_facts(config: Any) -> dict[str, Any]:
    """A transformers config as plain JSON values."""
    facts: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return facts


def model_facts(skeleton: PreTrainedModel) -> dict[str, Any]:
    """What a manifest says of a model."""
    generation = getattr(skeleton, "generation_config", None)
    # a config leaves it out of what it tells of itself, but other kernels would give other last bits
    eager = {"attn_implementation": "eager"} if skeleton.config._attn_implementation == "eager" else {}
    return {
        "model": {**config_facts(skeleton.config), **eager},
        "model_class": type(skeleton).__name__,
        "generation": None if generation is None else config_facts(generation),
        "adapter": saved_config(skeleton),
    }


def check_weights(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a CheckpointError unless the checkpoint has every parameter of the model, in its shape, and no other."""
    found = checkpoint.shapes
    faults = {
        "missing": [name for name in shapes if name not in found],
        "unexpected": [name for name in found if name not in shapes],
        "of another shape": [
            f"{name} ({list(found[name])} saved, {list(shape)} in the model)"
            for name, shape in shapes.items()
            if found.get(name, shape) != shape
        ],
    }
    texts = [f"{len(names)} {what}: {_some(names)}" for what, names in faults.items() if names]
    if texts:
        raise CheckpointError(f"the weights in {checkpoint.folder} are not this model's: {'; '.join(texts)}")


def check_same(
    checkpoint: Checkpoint, layouts: tuple[BlockLayout, ...], skeleton: PreTrainedModel, adamw: AdamW
) -> None:
    """Raise a CheckpointError naming what differs between a checkpoint and what is to go on from it."""
    manifest = checkpoint.manifest
    assert manifest.optimizer is not None
    differing = [
        *differences("model.config.", manifest.model, config_facts(skeleton.config), ignored=_IDLE_KEYS),
        *differences("adapter ", manifest.adapter or {}, saved_config(skeleton) or {}, ignored=_IDLE_ADAPTER_KEYS),
        *differences("optim.", manifest.optimizer, optimizer_facts(adamw), ignored={"moments"}),
    ]
    frozen = {p.name for lay in layouts for p in lay.params if not p.spec.trainable}
    for names, what in ((set(manifest.frozen) - frozen, "trained"), (frozen - set(manifest.frozen), "frozen")):
        if names:
            differing.append(f"model.freeze: {what} now, but not when it was saved: {_some(sorted(names))}")
    if differing:
        raise CheckpointError(
            f"{checkpoint.folder} was saved with other settings: {'; '.join(differing)}; set them as they were, or "
            "take its weights alone (resume_weights_only=true, or weights_only=True)"
        )


def differences(
    prefix: str,
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    ignored: Set[str] = frozenset(),
) -> list[str]:
    """`key: A when it was saved, B now` for every key whose values differ."""
    keys = sorted((saved.keys() | now.keys()) - ignored)
    return [
        f"{prefix}{key}: {saved.get(key)!r} when it was saved, {now.get(key)!r} now"
        for key in keys
        if saved.get(key) != now.get(key)
    ]


def restore_weights(checkpoint: Checkpoint, store: HostStore) -> None:
    """Fill all masters.

    Raises:
        CheckpointError: an array is damaged; others, and parts of it, have been stored.
    """
    checkpoint.read_each(
        (checkpoint.spec(param.name, MASTER_KIND), partial(_write_masters, store, layout.index, param.offset))
        for layout in store.layouts
        for param in layout.params
    )


def clear_moments(store: HostStore) -> None:
    """Have all moments as they are before the first step."""
    for layout in store.layouts:
        for name in store.moments:
            store.clear_state(name, layout.index)


def restore_moments(checkpoint: Checkpoint, store: HostStore, moments: Moments, seed: int) -> None:
    """Fill the moments of all trained parameters; errors as `restore_weights`."""
    manifest = checkpoint.manifest
    assert manifest.optimizer is not None
    saved = Moments(manifest.optimizer["moments"])
    trained = [(layout.index, param) for layout in store.layouts for param in layout.trainable]
    if saved is moments:
        checkpoint.read_each(
            (
                checkpoint.spec(param.name, state.name),
                partial(_write_numbers, store, block, state.name, state.span(param.offset, param.end).start),
            )
            for block, param in trained
            for state in MOMENTS[moments]
        )
        return
    for block, param in trained:
        for start, both in _as_float32(checkpoint, param, saved):
            first = param.offset + start
            random = random_bits(noise(seed, manifest.step, block, first), both[0].size)
            _store(partial(store.write_numbers, block), first, both, moments, random)


def _write_masters(store: HostStore, block: int, first: int, start: int, masters: Tensor) -> None:
    """Store masters of a block, from `first + start` on, in the format that it has them in."""
    start += first
    split = bool(store.residual)
    for piece in torch.split(masters, PIECE):
        if split is not (piece.dtype is torch.float32):  # of the other format
            store.write_elements(block, start, piece)
        elif split:
            _write_halves(store, block, start, piece)
        else:
            _write_numbers(store, block, "weights", 0, start, piece)
        start += piece.numel()


def _write_halves(store: HostStore, block: int, start: int, masters: Tensor) -> None:
    """Split masters right where the halves belong, if that is host memory."""
    from horizon.optim.kernel import split_numba  # here: `horizon.checkpoints`, which a plan imports, has no use for it

    dtypes = {"weights": torch.bfloat16, "residual": torch.int16}
    places = {name: _in_memory(store, block, name, start, masters.numel()) for name in dtypes}
    halves = {
        name: torch.empty(masters.numel(), dtype=dtypes[name]) if place is None else place
        for name, place in places.items()
    }
    split_numba(masters.view(torch.int32).numpy(), *(half.view(torch.int16).numpy() for half in halves.values()))
    for name, half in halves.items():
        if places[name] is None:
            store.write_numbers(block, name, start, half)


def _write_numbers(store: HostStore, block: int, name: str, first: int, start: int, numbers: Tensor) -> None:
    """Store numbers of a state of a block from `first + start` on."""
    place = _in_memory(store, block, name, first + start, numbers.numel())
    if place is None:
        store.write_numbers(block, name, first + start, numbers)
    else:
        np.copyto(as_array(place), as_array(numbers))  # torch would start threads for each of those that read


def _in_memory(store: HostStore, block: int, name: str, start: int, num: int) -> Tensor | None:
    """Numbers of a state where they lie, if that is host memory."""
    state = store.states(block)[name]
    is_here = state.device.type == "cpu" and (name, block) not in store.on_nvme
    return state[start : start + num] if is_here else None


def _as_float32(checkpoint: Checkpoint, param: Param, saved: Moments) -> Iterator[tuple[int, tuple[Array, Array]]]:
    """(first element, (exp_avg, exp_avg_sq)) of runs of a parameter that begin with a group, flat in fp32."""
    scales = [checkpoint.read(param.name, state.name).numpy() for state in MOMENTS[saved][2:]]
    spec = checkpoint.spec(param.name, "exp_avg")
    names = ("exp_avg", "exp_avg_sq")
    if all(chunk.start % GROUP == 0 for chunk in spec.chunks):
        parts = zip(*(checkpoint.chunks(param.name, name) for name in names), strict=True)
        runs = ((start, m, v) for (start, m), (_, v) in parts)
    else:  # rows so long that a chunk is less than 64 of them: the parameter at once
        m, v = (checkpoint.read(param.name, name).reshape(-1) for name in names)
        runs = (run for run in [(0, m, v)])
    for start, m, v in runs:
        if saved is Moments.int8:
            groups = slice(start // GROUP, -(-(start + m.numel()) // GROUP))
            yield start, (read_m(m.numpy(), scales[0][groups]), read_v(v.numpy(), scales[1][groups]))
        else:
            yield start, (m.float().numpy(), v.float().numpy())


def _store(write: Write, first: int, both: tuple[Array, Array], moments: Moments, random: Array) -> None:
    """Write flat fp32 moments from element `first` of a block on, in the format that those have."""
    for state, values, to_codes in zip(MOMENTS[moments][:2], both, (write_m, write_v), strict=True):
        if moments is Moments.int8:
            codes, scales = to_codes(values, random)
            write(state.name, first, torch.from_numpy(codes))
            write(f"{state.name}_scale", first // GROUP, torch.from_numpy(scales))
        elif moments is Moments.bfloat16:
            below = random & np.uint32(0xFFFF) if to_codes is write_m else random >> np.uint32(16)
            bits = ((values.view(np.uint32) + below) >> np.uint32(16)).astype(np.uint16)
            write(state.name, first, torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16))
        else:
            write(state.name, first, torch.from_numpy(values))


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NUM_NAMED]) + (", ..." if len(names) > _NUM_NAMED else "")
