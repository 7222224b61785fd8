"""Which tier of the host holds which state of which block: rules, the policies made of them, and what spills to nvme.

A rule names states, blocks and a tier; the first that fits decides, what none names is in dram. A policy is a list of
rules that follow the user's own. Gradients that wait for their update count as a state, `grads`. `activations` are the
boundaries that leave the device, of whichever blocks: a rule decides on all of them. Pure arithmetic on layouts and
budgets.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from horizon.config.schema import MemoryConfig, NvmeEngine, Policy, Tier, TierRule
from horizon.config.values import choice, settings
from horizon.errors import ConfigError
from horizon.layout import BlockLayout
from horizon.plan.disk import Place
from horizon.plan.memory import ACTIVATIONS, GRADS, Limits, MemoryNeeds, fixed_lines

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
    choice(NvmeEngine, memory.nvme_engine, "memory.nvme_engine")
    policy = choice(Policy, memory.policy, "memory.policy")
    if memory.nvme_dir is None and any(rule.tier is Tier.nvme for rule in (*rules, *POLICY_RULES.get(policy, ()))):
        setting = "tier=nvme in memory.rules" if rules else f"memory.policy={policy}"
        raise ConfigError(f"{setting} needs a folder on a local disk; set memory.nvme_dir")
    return tuple(rules)


def apply_rules(rules: Sequence[TierRule], policy: Sequence[TierRule], needs: MemoryNeeds) -> MemoryNeeds:
    """`needs` with every state where the first rule that fits says, the policy's coming last.

    Raises:
        ConfigError: a rule of `rules` decides nothing, puts a part of a block in hbm, or activations where none can be.
    """
    names = {lay.index: _placeable(needs, lay) for lay in needs.layouts}
    tiers: dict[Place, Tier] = {}
    decided = set[int]()
    for layout in needs.layouts:
        for name in names[layout.index]:
            for i, rule in enumerate((*rules, *policy)):
                if fnmatchcase(name, rule.state) and names_block(rule.blocks, layout):
                    tiers[name, layout.index] = rule.tier
                    decided.add(i)
                    break
    boundaries = Tier.dram
    for i, rule in enumerate((*rules, *policy)):
        if _decides_on_boundaries(rule, f"memory.rules[{i}]", needs):
            boundaries = rule.tier
            decided.add(i)
            break
    for i, rule in enumerate(rules):
        if i not in decided:
            raise ConfigError(f"memory.rules[{i}] {_describe(rule)} decides nothing: {_choices(needs)}")
    in_hbm = frozenset(block for (_, block), tier in tiers.items() if tier is Tier.hbm)
    for layout in needs.layouts:
        if layout.index in in_hbm:
            _check_whole(layout, names[layout.index], tiers, in_hbm)
    placed = {place: tier for place, tier in tiers.items() if tier not in (Tier.hbm, Tier.dram)}
    return replace(needs, in_hbm=in_hbm, placed=placed, boundaries=boundaries)


def _placeable(needs: MemoryNeeds, layout: BlockLayout) -> list[str]:
    """The states of a block, and its gradient where that waits."""
    waits = needs.keeps_gradients and layout.num_trainable
    return [state.name for state in needs.states if state.numel(layout)] + [GRADS] * bool(waits)


def _decides_on_boundaries(rule: TierRule, name: str, needs: MemoryNeeds) -> bool:
    """Whether the rule says where offloaded boundaries go; one that names states, too, does where that is possible.

    Raises:
        ConfigError: it names them alone, and a tier or blocks for which that is not possible.
    """
    if not fnmatchcase(ACTIVATIONS, rule.state):
        return False
    possible = rule.tier in (Tier.dram, Tier.nvme) and rule.blocks.strip() == "*"
    if not possible and not any(fnmatchcase(state, rule.state) for state in (*(s.name for s in needs.states), GRADS)):
        raise ConfigError(
            f"{name} {_describe(rule)}: activations that leave the device go to dram or nvme (to cxl with "
            "memory.policy=cxl_aware), those of all blocks alike, as it depends on the batch which ones leave; use "
            "blocks=* and tier=nvme, and memory.device_budget to say how many stay"
        )
    return possible


def _describe(rule: TierRule) -> str:
    return f"(state={rule.state}, blocks={rule.blocks}, tier={rule.tier})"


def _choices(needs: MemoryNeeds) -> str:
    """What a rule could have named."""
    names = [*(state.name for state in needs.states), *([GRADS] if needs.keeps_gradients else []), ACTIVATIONS]
    no_grads = "" if needs.keeps_gradients else " (no grads, which do not wait with this clipping)"
    first, second, *_, last = (layout.name for layout in needs.layouts)
    return (
        f"no such states or blocks, or rules before it do; states are {', '.join(names)}{no_grads}, "
        f"blocks 0 to {len(needs.layouts) - 1} or {first}, {second}, ..., {last}"
    )


def _check_whole(
    layout: BlockLayout, names: Sequence[str], tiers: Mapping[Place, Tier], in_hbm: frozenset[int]
) -> None:
    """Raise a ConfigError unless the block is in hbm with all its states and all that it borrows.

    Its gradient is there, too, unless a rule says otherwise.
    """
    for name in names:
        tier = tiers.get((name, layout.index), Tier.hbm if name == GRADS else Tier.dram)
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

    What only the update reads goes first. Then gradients, which every pass writes, and weights, which it reads. What
    goes of one kind is spread over the model, so that the disk is at work all along the update, and the first blocks,
    whose updates are awaited soonest, come last. Should nothing fit, all is there, and the plan refuses it.
    """
    gone: list[Place] = []

    def fits(places: Sequence[Place]) -> bool:
        return tier_bytes(replace(needs, placed=dict.fromkeys(places, Tier.nvme)))[0] <= limits.host

    for kind in _spilling_order(needs):
        if fits(gone):  # the first of a kind brings staging, so that more of it may fit worse
            break
        options = [[*gone, *_spread(kind, num)] for num in range(len(kind) + 1)]
        gone = options[bisect_left(options[:-1], True, key=fits)]
    return replace(needs, placed=dict.fromkeys(gone, Tier.nvme)) if gone else needs


def _spread(places: Sequence[Place], num: int) -> list[Place]:
    """So many of them at equal distances, the last one first."""
    return [places[-1 - i * len(places) // num] for i in range(num)]


def _spilling_order(needs: MemoryNeeds) -> list[list[Place]]:
    """What may leave host memory, by kind, those first that cost a step least."""
    blocks = [lay for lay in needs.layouts if lay.index not in needs.in_hbm]
    optimizer = [state for state in needs.states if state.name != "weights"]
    large = [state.name for state in optimizer if state.group == 1]
    scales = [state.name for state in optimizer if state.group > 1]
    return [
        [(name, lay.index) for lay in blocks for name in kind if name in _placeable(needs, lay)]
        for kind in (large, scales, [GRADS], ["weights"])
    ]


def tier_bytes(needs: MemoryNeeds) -> tuple[int, int]:
    """The fixed bytes of (host, device)."""
    lines = fixed_lines(needs)
    host, device = (sum(line.num_bytes for line in lines if line.tier == tier) for tier in ("host", "device"))
    return host, device
