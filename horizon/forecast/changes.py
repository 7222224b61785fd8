"""Other settings for the same run: which there are, how far each is from what was asked for, and how one is applied."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from itertools import combinations, product
from typing import Any, NamedTuple

from horizon.config.schema import Clip, HorizonConfig, MemoryConfig, Moments, OnNonFinite, Policy, Recompute
from horizon.plan.cxl import POLICIES as CXL_POLICIES
from horizon.plan.policies import POLICY_RULES
from horizon.units import format_size

Change = Mapping[str, Any]  # setting -> value
TOGETHER = 4  # settings that are changed at a time, at most
SHORTEST = 128  # tokens of a row; to train on shorter ones is to train something else


class Lever(NamedTuple):
    """One setting and the other values it may have, nearest first."""

    key: str
    values: tuple[Any, ...]
    cost: int  # of each step along the values: 1 where only bytes move, more where what is trained changes


def changed(config: HorizonConfig, change: Change) -> HorizonConfig:
    """`config` with these settings instead of its own."""
    for key, value in change.items():
        config = _changed(config, key, value)
    return config


def _changed(settings: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    return dataclasses.replace(settings, **{name: _changed(getattr(settings, name), rest, value) if rest else value})


def setting(config: HorizonConfig, key: str) -> Any:
    """The value of a setting by its name, such as `memory.policy`."""
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def describe(change: Change) -> str:
    """As on a command line."""
    return " ".join(f"{key}={_text(value)}" for key, value in change.items())


def plain(change: Change) -> dict[str, Any]:
    """For JSON."""

    def one(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        return str(value) if isinstance(value, StrEnum) else value

    return {key: one(value) for key, value in change.items()}


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def _halves(value: int) -> tuple[int, ...]:
    """`value` halved until it is 1."""
    found = []
    while value > 1:
        value = -(-value // 2)
        found.append(value)
    return tuple(found)


def smaller_levers(
    config: HorizonConfig, on_gpu: bool, budgets: Mapping[str, str], has_cxl: bool = False
) -> list[Lever]:
    """What may make a run fit.

    Args:
        budgets: by setting a larger budget that the machine has room for.
        has_cxl: the machine has a cxl tier.
    """
    memory, optim, train = config.memory, config.optim, config.train
    levers = [
        Lever("memory.policy", _policies(memory, on_gpu, has_cxl), 1),
        Lever("memory.rules", ([],) if memory.rules else (), 1),
        *_without_cxl(memory),
        Lever("memory.hbm_blocks", (None,) if memory.hbm_blocks is not None else (), 1),
        Lever("memory.turn_layers", (None,) if memory.turn_layers else (), 1),
        Lever("memory.recompute", (Recompute.auto,) if memory.recompute is not Recompute.auto else (), 1),
        Lever("train.micro_batch", (None,) if train.micro_batch is not None else (), 1),
        Lever("memory.weight_slots", (1,) if memory.weight_slots != 1 else (), 2),
        *(Lever(key, (size,), 3) for key, size in budgets.items()),
        Lever("optim.moments", tuple(m for m in (Moments.bfloat16, Moments.int8) if _less(m, optim.moments)), 3),
        Lever("train.on_nonfinite", (OnNonFinite.stop,) if train.on_nonfinite is not OnNonFinite.stop else (), 4),
        Lever("optim.clip", _clips(config), 4),
        Lever("optim.max_grad_norm", (None,) if optim.max_grad_norm is not None else (), 5),
        Lever("train.batch_size", _halves(train.batch_size), 4),
        Lever("train.seq_len", tuple(length for length in _halves(train.seq_len) if length >= SHORTEST), 6),
    ]
    return [lever for lever in levers if lever.values]


def _policies(memory: MemoryConfig, on_gpu: bool, has_cxl: bool) -> tuple[Policy, ...]:
    """Other policies that place states otherwise than the one that was asked for."""
    everywhere = (Policy.auto, Policy.dram) if memory.policy in (*POLICY_RULES, *CXL_POLICIES) else ()
    on_device = (Policy.auto, Policy.hbm_first, Policy.dram) if on_gpu else ()
    on_disk = (Policy.auto, *POLICY_RULES) if memory.nvme_dir is not None else ()
    on_cxl = (Policy.cxl_aware,) if has_cxl else ()
    found = dict.fromkeys((*everywhere, *on_device, *on_disk, *on_cxl))
    return tuple(policy for policy in found if policy is not memory.policy)


def _without_cxl(memory: MemoryConfig) -> list[Lever]:
    """The settings of the cxl tier as they are where no state is there: other values are refused then."""
    given = {
        "memory.cxl_nodes": (memory.cxl_nodes, "auto"),
        "memory.cxl_budget": (memory.cxl_budget, "auto"),
        "memory.cxl_simulated.size": (memory.cxl_simulated.size, None),
    }
    return [Lever(key, (default,), 1) for key, (value, default) in given.items() if value != default]


def _less(moments: Moments, current: Moments) -> bool:
    order = list(Moments)
    return order.index(moments) > order.index(current)


def _clips(config: HorizonConfig) -> tuple[Clip, ...]:
    """Kinds of clipping that take less memory."""
    optim = config.optim
    if optim.max_grad_norm is None or optim.clip is Clip.lagged:
        return ()
    return (Clip.exact, Clip.lagged) if optim.clip is Clip.speculative else (Clip.lagged,)


def nearest_changes(levers: list[Lever]) -> list[Change]:
    """All changes of up to `TOGETHER` settings, those that cost least first."""
    found = []
    for size in range(1, TOGETHER + 1):
        for chosen in combinations(levers, size):
            for places in product(*(range(len(lever.values)) for lever in chosen)):
                cost = sum(lever.cost * (place + 1) for lever, place in zip(chosen, places, strict=True))
                change = {lever.key: lever.values[place] for lever, place in zip(chosen, places, strict=True)}
                found.append((cost, change))
    return [change for _, change in sorted(found, key=lambda pair: pair[0])]


def alternatives(config: HorizonConfig, micro_batch: int, budget: int | None, most: int) -> list[Change]:
    """Settings near those asked for that may be faster or smaller; one or two changed at a time.

    Args:
        micro_batch: rows that were chosen.
        budget: bytes of the device's budget; None: there is no GPU.
        most: bytes that the device has at most.
    """
    optim, train, memory = config.optim, config.train, config.memory
    found: list[dict[str, Any]] = [{"optim.moments": m} for m in Moments if m is not optim.moments]
    if optim.max_grad_norm is not None:
        found.append({"optim.max_grad_norm": None, **({} if optim.clip is Clip.exact else {"optim.clip": Clip.exact})})
        found += [{"optim.clip": clip} for clip in Clip if clip is not optim.clip]
    if budget is not None:
        found += [{"memory.policy": policy} for policy in Policy if policy not in (memory.policy, *POLICY_RULES)]
        sizes = [size for size in (budget // 2, 2 * budget) if size < most]
        found += [{"memory.device_budget": format_size(size)} for size in sizes]
        if memory.device_budget != "auto":
            found.append({"memory.device_budget": "auto"})
    for rows in (micro_batch // 2, 2 * micro_batch):
        if 0 < rows <= train.batch_size:
            found.append({"train.micro_batch": rows})
    found += [{"train.batch_size": rows} for rows in (train.batch_size // 2, 2 * train.batch_size) if rows]
    return list(found)
