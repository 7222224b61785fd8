"""Where the cxl policies put states never changes a bit: a simulated tier, and nodes that memory is bound to."""

import time

import pytest

from horizon import MemoryConfig, runtime
from horizon.config.schema import SimulatedCxl, Tier
from horizon.plan.cxl import CxlTier
from horizon.plan.topology import read_topology
from horizon.store import numa
from tests.covering import pairwise
from tests.parity.reference import (
    Resident,
    assert_same,
    build,
    engine_for,
    outcome,
    plain,
    streamed_step,
)
from tests.parity.undisturbed import assert_alike, steps, undisturbed

STATES = 2 + 2 + 8  # bytes a parameter
BUDGETS = {"all on cxl": "1", "moments in dram": "300KiB", "all but gradients in dram": "400KiB", "all in dram": "1GiB"}


def model(**changes):
    return build("llama", num_hidden_layers=3, **changes)


def simulated(policy="cxl_aware", host="1", gb_per_s=1000.0):
    return MemoryConfig(
        policy=policy, host_budget=host, cxl_simulated=SimulatedCxl(size="64MiB", gb_per_s=gb_per_s)
    )  # fmt: skip


@pytest.fixture
def light(monkeypatch):
    """The process itself takes nothing of the host budget, so that small budgets can be told apart."""
    monkeypatch.setattr(runtime, "host_overhead", lambda device: 0)


def trained(memory, **settings):
    with engine_for(model(), memory=memory, **settings) as engine:
        return undisturbed(engine)


@pytest.mark.parametrize(("budget", "tied"), [*zip(BUDGETS, [False, True, True, False], strict=True)])
def test_training_equals_the_resident_models(light, budget, tied):
    resident = Resident(model(tie_word_embeddings=tied))
    with engine_for(model(tie_word_embeddings=tied), memory=simulated(host=BUDGETS[budget])) as engine:
        for batches in steps():
            assert_same(streamed_step(engine, batches), resident.step(batches))


def test_the_budgets_above_part_the_states_where_they_say(light):
    kinds = {}
    for name, host in BUDGETS.items():
        with engine_for(model(), memory=simulated(host=host)) as engine:
            placed = engine._runtime.needs.placed
        assert set(placed.values()) <= {Tier.cxl}
        kinds[name] = {state for state, _ in placed}
    assert kinds["all on cxl"] == {"exp_avg", "exp_avg_sq", "residual", "weights", "grads"}
    assert kinds["moments in dram"] == {"residual", "weights", "grads"}
    assert kinds["all but gradients in dram"] == {"grads"}
    assert kinds["all in dram"] == set()


@pairwise(policy=["cxl_aware", "interleave"], clip=[0.5, None], dtype=["float32", "bfloat16"])
def test_weights_are_those_of_dram(light, policy, clip, dtype):
    settings = {"max_grad_norm": clip, "compute_dtype": dtype}
    host = "1GB" if policy == "interleave" else "1"
    found = trained(simulated(policy, host), **settings)
    assert_alike(found, trained(MemoryConfig(policy="dram"), **settings))


@pytest.mark.parametrize("budget", BUDGETS)
def test_accumulated_gradients(light, budget):
    outcomes = []
    for memory in (MemoryConfig(policy="dram"), simulated(host=BUDGETS[budget])):
        with engine_for(model(), memory=memory, compute_dtype="bfloat16", max_grad_norm=None) as engine:
            engine.step(plain(5))  # through the ring, which then gives way
            for batches in steps()[:3]:
                engine.forward_backward(batches)
            outcomes.append(outcome(engine, engine.optimizer_step()))
            outcomes.append(outcome(engine, engine.step(plain(8))))
    assert_same(outcomes[2], outcomes[0])
    assert_same(outcomes[3], outcomes[1])


@pytest.mark.skipif(not read_topology().nodes, reason="the kernel shows no NUMA nodes")
@pytest.mark.parametrize("interleaved", [False, True], ids=["cxl_aware", "interleave"])
def test_memory_that_is_bound_by_the_kernel(light, monkeypatch, interleaved):
    """One real node stands for both tiers: every arena is bound, touched and looked up."""
    node = read_topology().nodes[0].id
    bound, bind = [], numa.bind
    monkeypatch.setattr(numa, "bind", lambda *arguments: (bound.append(arguments[2:]), bind(*arguments)))
    tier = CxlTier(1 << 30, (node,), (node,), None, interleaved, not interleaved)
    monkeypatch.setattr(tier.__class__, "nodes_of", lambda self, tier: (node,))
    monkeypatch.setattr(runtime, "find_cxl", lambda memory: tier)
    resident = Resident(model())
    memory = MemoryConfig(
        policy="interleave" if interleaved else "cxl_aware", host_budget="1GB" if interleaved else "1"
    )
    with engine_for(model(), memory=memory) as engine:
        for batches in steps():
            assert_same(streamed_step(engine, batches), resident.step(batches))
    assert {purpose for _, purpose in bound} == {"weights", "residual", "exp_avg", "exp_avg_sq", "grads"}
    assert {tuple(nodes) for nodes, _ in bound} == {(node,)}


def test_a_simulated_tier_slows_the_update_down(light):
    """By the time that its bandwidth would take; weights stay the same (above)."""
    with engine_for(model(), memory=simulated(gb_per_s=0.005)) as engine:
        engine.step(plain(1))
        engine._runtime.wait_for_updates()
        started = time.perf_counter()
        engine.step(plain(2))
        engine._runtime.wait_for_updates()
        took = time.perf_counter() - started
        trainable = sum(p.spec.numel for lay in engine._runtime.model.layouts for p in lay.trainable)
    assert took > 0.9 * trainable * (2 * STATES + 4) / 0.005e9
