"""Which tier of the host holds which state of which block: rules, the policies made of them, and what spills to nvme.

A rule names states, blocks and a tier; the first that fits decides, what none names is in dram. A policy is a list of
rules that follow the user's own. Pure arithmetic on layouts and budgets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from horizon.config.schema import MemoryConfig, Policy, Tier, TierRule
from horizon.config.values import choice, settings
from horizon.errors import ConfigError
from horizon.layout import BlockLayout
from horizon.plan.disk import Place
from horizon.plan.memory import Limits, MemoryNeeds, fixed_lines

POLICY_RULES: Mapping[Policy, tuple[TierRule, ...]] = {
    Policy.nvme_optimizer: (TierRule(state="exp_avg*", tier=Tier.nvme), TierRule(state="residual", tier=Tier.nvme)),
    Policy.nvme_all: (TierRule(tier=Tier.nvme),),
}
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def read_rules(memory: MemoryConfig) -> tuple[TierRule, ...]:
    """The user's rules, checked as far as that goes without a model.

    Raises:
        ConfigError: one is no rule, or something is on nvme without a folder.
    """
    rules = []
    for i, rule in enumerate(memory.rules):
        name = f"memory.rules[{i}]"
        given = settings(TierRule, rule, name)
        rules.append(TierRule(state=given.state, blocks=given.blocks, tier=choice(Tier, given.tier, f"{name}.tier")))
    policy = choice(Policy, memory.policy, "memory.policy")
    if memory.nvme_dir is None and any(rule.tier is Tier.nvme for rule in (*rules, *POLICY_RULES.get(policy, ()))):
        setting = "tier=nvme in memory.rules" if rules else f"memory.policy={policy}"
        raise ConfigError(f"{setting} needs a folder on a local disk; set memory.nvme_dir")
    return tuple(rules)


def apply_rules(rules: Sequence[TierRule], policy: Sequence[TierRule], needs: MemoryNeeds) -> MemoryNeeds:
    """`needs` with every state where the first rule that fits says, the policy's coming last.

    Raises:
        ConfigError: a rule of `rules` decides nothing, or puts a part of a block in hbm.
    """
    by_block = [[s for s in needs.states if s.numel(lay)] for lay in needs.layouts]
    tiers: dict[Place, Tier] = {}
    decided = [0] * len(rules)
    for layout, states in zip(needs.layouts, by_block, strict=True):
        for state in states:
            for i, rule in enumerate((*rules, *policy)):
                if fnmatchcase(state.name, rule.state) and names_block(rule.blocks, layout):
                    tiers[state.name, layout.index] = rule.tier
                    if i < len(rules):
                        decided[i] += 1
                    break
    for i, (rule, num) in enumerate(zip(rules, decided, strict=True)):
        if not num:
            names = ", ".join(state.name for state in needs.states)
            raise ConfigError(
                f"memory.rules[{i}] (state={rule.state}, blocks={rule.blocks}, tier={rule.tier}) decides nothing: no "
                f"such states or blocks, or rules before it do; states are {names}, blocks 0 to {len(by_block) - 1} or "
                f"{needs.layouts[0].name}, {needs.layouts[1].name}, ..., {needs.layouts[-1].name}"
            )
    in_hbm = frozenset(block for (_, block), tier in tiers.items() if tier is Tier.hbm)
    for layout in needs.layouts:
        if layout.index in in_hbm:
            _check_whole(layout, [s.name for s in by_block[layout.index]], tiers, in_hbm)
    placed = {place: tier for place, tier in tiers.items() if tier not in (Tier.hbm, Tier.dram)}
    return replace(needs, in_hbm=in_hbm, placed=placed)


def _check_whole(
    layout: BlockLayout, names: Sequence[str], tiers: Mapping[Place, Tier], in_hbm: frozenset[int]
) -> None:
    """Raise a ConfigError unless the block is in hbm with all its states and all that it borrows."""
    for name in names:
        tier = tiers.get((name, layout.index), Tier.dram)
        if tier is not Tier.hbm:
            raise ConfigError(
                f"memory.rules put a part of block {layout.name} in hbm, but its {name} on {tier}; hbm holds all "
                "states of a block or none: use state=* there"
            )
    for borrowed in layout.borrowed:
        if borrowed.owner not in in_hbm:
            raise ConfigError(
                f"memory.rules put block {layout.name} in hbm without block {borrowed.owner}, whose "
                f"{borrowed.param.name} it shares; put both there"
            )


def names_block(pattern: str, layout: BlockLayout) -> bool:
    """Whether a comma-separated list of numbers, ranges (both ends included) and name patterns names the block."""
    for item in (part.strip() for part in pattern.split(",")):
        found = _RANGE.fullmatch(item)
        if found and int(found[1]) <= layout.index <= int(found[2] or found[1]):
            return True
        if not found and fnmatchcase(layout.name, item):
            return True
    return False


def spill(needs: MemoryNeeds, limits: Limits) -> MemoryNeeds:
    """`needs` with as little on nvme as it takes for the rest to fit host memory; as it is where all of it fits.

    What only the update reads goes first, from the last block downward: the first blocks' updates are awaited soonest.
    Weights, which are also read by every pass, go last. Should nothing fit, all is there, and the plan refuses it.
    """
    if tier_bytes(needs)[0] <= limits.host:
        return needs
    last_first = [lay for lay in reversed(needs.layouts) if lay.index not in needs.in_hbm]
    kinds = [[s for s in needs.states if s.name != "weights"], [s for s in needs.states if s.name == "weights"]]
    order = [(s.name, lay.index) for kind in kinds for lay in last_first for s in kind if s.numel(lay)]
    option = needs
    for num in range(1, len(order) + 1):
        option = replace(needs, placed=dict.fromkeys(order[:num], Tier.nvme))
        if tier_bytes(option)[0] <= limits.host:
            break
    return option


def tier_bytes(needs: MemoryNeeds) -> tuple[int, int]:
    """The fixed bytes of (host, device)."""
    lines = fixed_lines(needs)
    host, device = (sum(line.num_bytes for line in lines if line.tier == tier) for tier in ("host", "device"))
    return host, device
