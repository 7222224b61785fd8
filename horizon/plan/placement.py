"""Which blocks' states live in device memory (`hbm`) and which on the host: pure arithmetic on layouts and budgets.

What `horizon.plan.policies` puts on other tiers of the host stays there; blocks then do not move.

A block in HBM is updated by the device, costs no transfer and no host memory. The order in which blocks get there:

1. The embedding: last in the backward and first in the next forward, so its update on the host hides behind nothing.
2. A head that borrows it: what it has of its own is next to nothing, and a slot of the embedding's size goes with it.
3. The layers from the first upward: with exact clipping, host updates hide behind the forward of the blocks below.
4. A head of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from horizon.config.schema import MasterFormat, MemoryConfig, Moments, Policy, Tier, TierRule
from horizon.config.values import choice
from horizon.errors import ConfigError
from horizon.layout import BlockLayout, first_trained
from horizon.plan.cxl import POLICIES as CXL_POLICIES
from horizon.plan.levels import fill_dram
from horizon.plan.memory import Limits, MemoryNeeds
from horizon.plan.policies import POLICY_RULES, apply_rules, read_rules, spill, tier_bytes
from horizon.units import GIB, parse_bytes


def unknown_activations(limits: Limits) -> int:
    """Bytes of the device left for activations before the shape of a batch is known.

    What moves to the host later costs less than what is allocated there first and moves to HBM.
    """
    return max(limits.device // 4, 16 * GIB)


@dataclass(frozen=True, slots=True)
class Placer:
    """What the settings say of where blocks live; see `read_policy`."""

    policy: Policy  # auto: the embedding, then activations and what layers keep to be run again less, then more blocks
    num_blocks: int | None = None  # in HBM; None: the policy decides
    rules: tuple[TierRule, ...] = ()  # if there are some, they decide
    spills: bool = False  # what host memory does not hold goes to nvme
    reserve: int = 0  # bytes of host memory that states leave then
    slots: int | None = None  # for weights; None: the plan decides
    turns: bool = True  # the plan decides how many layers are at the turn

    @property
    def moves(self) -> bool:
        """Whether the placement follows what activations need."""
        return self.policy in (Policy.auto, Policy.hbm_first) and self.num_blocks is None and not self.rules

    def place(self, needs: MemoryNeeds, limits: Limits, reserve: int) -> MemoryNeeds:
        """`needs` with the blocks that go to HBM when `reserve` bytes of the device are left for activations.

        States on other tiers of the host are placed once, and no block moves after that.
        """
        if self.policy is Policy.cxl_aware:  # again where gradients have grown: they come after all states
            return fill_dram(replace(needs, in_hbm=frozenset()), limits)
        if self.rules or self.policy in POLICY_RULES:  # again where gradients have come to wait: states stay
            return apply_rules(self.rules, POLICY_RULES.get(self.policy, ()), needs)
        if needs.placed:
            return needs
        if self.num_blocks is not None:
            chosen = replace(needs, in_hbm=first_blocks(needs.layouts, self.num_blocks))
        elif self.moves:
            chosen = replace(needs, in_hbm=choose_placement(needs, limits, reserve))
        else:
            chosen = replace(needs, in_hbm=frozenset())
        return spill(chosen, replace(limits, host=max(0, limits.host - self.reserve))) if self.spills else chosen

    def bases(self, needs: MemoryNeeds, limits: Limits) -> list[MemoryNeeds]:
        """What is in HBM before activations have their share: the first of these that leaves enough for them.

        With `auto` the embedding comes before what layers keep, for it saves a wait that nothing else does.
        """
        fewest = self.place(needs, limits, limits.device)
        if needs.placed or self.policy is not Policy.auto or self.num_blocks is not None:
            return [fewest]
        first = first_blocks(needs.layouts, 2 if needs.layouts[-1].borrowed else 1)
        return [replace(fewest, in_hbm=fewest.in_hbm | first), fewest]

    def make_room(self, needs: MemoryNeeds, limits: Limits, reserve: int) -> MemoryNeeds:
        """As `place`, but no block moves to HBM that is not there already."""
        placed = self.place(needs, limits, reserve)
        return replace(placed, in_hbm=needs.in_hbm & placed.in_hbm)


def read_policy(
    memory: MemoryConfig, device: torch.device, can_update: bool, num_blocks: int,
    moments: Moments = Moments.float32, master: MasterFormat = MasterFormat.split,
) -> Placer:  # fmt: skip
    """The settings, checked. On CPU, where HBM would be the same memory, `auto` is `dram`.

    It is, too, where moments or masters are not in fp32: the device updates no others.

    Args:
        can_update: the device can update blocks in its memory.
        num_blocks: of the model.

    Raises:
        ConfigError: they contradict each other or the machine.
    """
    policy, wanted = choice(Policy, memory.policy, "memory.policy"), memory.hbm_blocks
    rules = read_rules(memory)
    if wanted is not None and not 0 <= wanted <= num_blocks:
        raise ConfigError(f"memory.hbm_blocks={wanted}: expected null, or 0 to {num_blocks}, the model's blocks")
    if wanted and (rules or policy not in (Policy.auto, Policy.hbm_first)):
        by = "memory.rules, which say it block by block" if rules else f"memory.policy={policy}, which has none there"
        raise ConfigError(f"memory.hbm_blocks={wanted} with {by}; use memory.policy=auto alone")
    if rules and policy is Policy.hbm_first:
        raise ConfigError("memory.rules with memory.policy=hbm_first: rules say what is in hbm; use memory.policy=auto")
    if rules and policy in CXL_POLICIES:
        raise ConfigError(f"memory.rules with memory.policy={policy}: rules say what is on cxl; use memory.policy=auto")
    by_rule = any(rule.tier is Tier.hbm for rule in rules)
    if (wanted or by_rule or policy is Policy.hbm_first) and not can_update:
        raise ConfigError("blocks in HBM are updated with Triton, which is not installed here; use memory.policy=dram")
    narrow = [
        f"optim.{name}={value}"
        for name, value, full in (("moments", moments, Moments.float32), ("master", master, MasterFormat.split))
        if value is not full
    ]
    if (wanted or by_rule or policy is Policy.hbm_first) and narrow:
        setting = (
            f"memory.hbm_blocks={wanted}"
            if wanted
            else "tier=hbm in memory.rules"
            if by_rule
            else "memory.policy=hbm_first"
        )
        raise ConfigError(
            f"{setting} with {narrow[0]}: blocks in HBM have split masters and float32 moments; use memory.policy=dram "
            "(memory.hbm_blocks=null), or optim.moments=float32 and optim.master=split"
        )
    spills = policy is Policy.auto and memory.nvme_dir is not None and not rules
    if policy is Policy.auto and (device.type == "cpu" or not can_update or narrow):
        policy = Policy.dram
    reserve = _read_reserve(memory, spills)
    return Placer(policy, wanted, rules, spills, reserve, memory.weight_slots, memory.turn_layers is None)


def _read_reserve(memory: MemoryConfig, spills: bool) -> int:
    """Bytes of `memory.host_reserve`.

    Raises:
        ConfigError: it is no size, or states would not go anywhere for it.
    """
    if memory.host_reserve is None:
        return 0
    if not spills:
        missing = "without memory.nvme_dir" if memory.nvme_dir is None else f"with memory.policy={memory.policy}"
        missing = "with memory.rules" if memory.rules else missing
        raise ConfigError(
            f"memory.host_reserve={memory.host_reserve} {missing}: nothing leaves host memory for it; use "
            "memory.policy=auto alone and memory.nvme_dir, or memory.host_reserve=null"
        )
    return parse_bytes(memory.host_reserve, "memory.host_reserve")


def turn_layers(memory: MemoryConfig, layouts: Sequence[BlockLayout]) -> int:
    """Layers at the turn that are asked for; 0 where the plan decides.

    Raises:
        ConfigError: there are not so many, or some have nothing to train below the head.
    """
    wanted, most = memory.turn_layers, most_turn_layers(layouts)
    if wanted is not None and not 0 <= wanted <= most:
        raise ConfigError(
            f"memory.turn_layers={wanted}: expected null, or 0 to {most}, the layers from the lowest that trains upward"
        )
    return wanted or 0


def most_turn_layers(layouts: Sequence[BlockLayout]) -> int:
    """The layers that backward comes to."""
    return len(layouts) - 1 - max(1, first_trained(layouts))


def preference(layouts: Sequence[BlockLayout]) -> list[int]:
    """All blocks in the order in which they move to HBM; a block comes after those that it borrows from."""
    embedding, *layers, head = (lay.index for lay in layouts)
    return [embedding, head, *layers] if layouts[head].borrowed else [embedding, *layers, head]


def first_blocks(layouts: Sequence[BlockLayout], num_blocks: int) -> frozenset[int]:
    """The `num_blocks` blocks that come first."""
    return frozenset(preference(layouts)[:num_blocks])


def choose_placement(needs: MemoryNeeds, limits: Limits, reserve: int) -> frozenset[int]:
    """The blocks that go to HBM when `reserve` bytes of the device are left for activations.

    As many as fit. More, should the host have no room for the others; whether the device then has, the plan decides.
    """
    num_blocks = len(needs.layouts)
    placed = [first_blocks(needs.layouts, num) for num in range(num_blocks + 1)]
    sizes = [tier_bytes(replace(needs, in_hbm=in_hbm)) for in_hbm in placed]
    fits = [num for num, (_, device) in enumerate(sizes) if device + reserve <= limits.device]
    allowed = [num for num, (host, _) in enumerate(sizes) if host <= limits.host]
    best, least = max(fits, default=0), min(allowed, default=0)
    if least > best and sizes[least][1] <= limits.device:
        best = least
    return placed[best]
