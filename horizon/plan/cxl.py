"""The `cxl` tier of a run: its NUMA nodes, striped where there are several, or a stand-in in ordinary memory.

`horizon.plan.levels` says which states go there.
"""

from __future__ import annotations

from dataclasses import dataclass

from horizon.config.schema import MemoryConfig, Policy, SimulatedCxl, Tier
from horizon.config.values import choice, settings
from horizon.errors import ConfigError
from horizon.plan.topology import Topology
from horizon.units import parse_bytes

POLICIES = (Policy.cxl_aware, Policy.interleave)


@dataclass(frozen=True, slots=True)
class CxlTier:
    """Nodes and room of the tier; the default: a machine, or a policy, without it."""

    num_bytes: int = 0  # that it may hold
    nodes: tuple[int, ...] = ()  # none: a stand-in, of a machine that is described only, or no tier at all
    dram_nodes: tuple[int, ...] = ()  # that the dram tier is bound to; none: where the kernel puts pages
    bytes_per_s: float | None = None  # of a stand-in
    interleaved: bool = False  # every array lies on all nodes of both tiers
    boundaries: bool = False  # offloaded boundaries that find no idle buffer lie here, not in dram

    @property
    def simulated(self) -> bool:
        """It is ordinary memory, slowed down."""
        return self.bytes_per_s is not None

    @property
    def name(self) -> str:
        """The tier's, in every output."""
        return "cxl (simulated)" if self.simulated else "cxl"

    def describe(self) -> str:
        """One line on what the tier is."""
        if self.bytes_per_s is not None:
            pace = f"{self.bytes_per_s / 1e9:.3g} GB/s"
            return f"the cxl tier is simulated: ordinary memory that updates use at {pace}; no measure of real CXL"
        return f"the cxl tier is NUMA nodes {', '.join(map(str, self.nodes))}"

    @property
    def note(self) -> str:
        """What follows the title of what comes of a stand-in."""
        return f", {self.name}" if self.simulated else ""

    @property
    def budget_key(self) -> str:
        """The setting that says how much it may hold."""
        return "memory.cxl_simulated.size" if self.simulated else "memory.cxl_budget"

    @property
    def share(self) -> float:
        """Of an interleaved array, what lies on this tier."""
        if not self.interleaved:
            return 0.0
        return len(self.nodes) / len(self.nodes + self.dram_nodes) if self.nodes else 0.5

    @property
    def boundary_nodes(self) -> tuple[int, ...]:
        """NUMA nodes of offloaded boundaries."""
        return self.nodes_of(Tier.cxl if self.boundaries else Tier.dram)

    def nodes_of(self, tier: Tier) -> tuple[int, ...]:
        """NUMA nodes that an array of a tier is striped over; none: the kernel decides."""
        if self.interleaved:
            return self.nodes and tuple(sorted(self.nodes + self.dram_nodes))
        return self.nodes if tier is Tier.cxl else self.dram_nodes


NO_CXL = CxlTier()


def wants_cxl(memory: MemoryConfig) -> bool:
    """The policy uses the tier, or a rule names it."""
    return memory.policy in POLICIES or any(getattr(rule, "tier", None) == Tier.cxl for rule in memory.rules)


def read_cxl(memory: MemoryConfig, topology: Topology, bindable: bool = True) -> CxlTier:
    """The tier that the settings ask for.

    Args:
        bindable: the system lets this process choose nodes.

    Raises:
        ConfigError: settings contradict each other or the machine; says which nodes were found.
    """
    policy = choice(Policy, memory.policy, "memory.policy")
    simulated = settings(SimulatedCxl, memory.cxl_simulated, "memory.cxl_simulated")
    if not wants_cxl(memory):
        _refuse_unused(memory, policy, simulated)
        several = bindable and len(topology.with_memory()) > 1
        return CxlTier(dram_nodes=topology.dram_nodes() if several else ())
    budget = None if memory.cxl_budget == "auto" else parse_bytes(memory.cxl_budget, "memory.cxl_budget")
    interleaved, boundaries = policy is Policy.interleave, policy is Policy.cxl_aware
    if simulated.size is not None:
        if memory.cxl_nodes != "auto" or budget is not None:
            raise ConfigError("memory.cxl_simulated.size with memory.cxl_nodes or memory.cxl_budget; set either")
        if not simulated.gb_per_s > 0:
            raise ConfigError(f"memory.cxl_simulated.gb_per_s must be > 0, got {simulated.gb_per_s}")
        size, pace = parse_bytes(simulated.size, "memory.cxl_simulated.size"), simulated.gb_per_s * 1e9
        return CxlTier(size, bytes_per_s=pace, interleaved=interleaved, boundaries=boundaries)
    nodes = topology.cxl_nodes(memory.cxl_nodes)
    free = topology.free_bytes(nodes)
    return CxlTier(free if budget is None else budget, nodes, topology.dram_nodes(nodes), None, interleaved, boundaries)


def _refuse_unused(memory: MemoryConfig, policy: Policy, simulated: SimulatedCxl) -> None:
    given = {
        "cxl_nodes": memory.cxl_nodes != "auto",
        "cxl_budget": memory.cxl_budget != "auto",
        "cxl_simulated.size": simulated.size is not None,
    }
    for name in (name for name, used in given.items() if used):
        raise ConfigError(
            f"memory.{name} has no use with memory.policy={policy}; "
            f"use {' or '.join(POLICIES)}, or a rule with tier=cxl"
        )
