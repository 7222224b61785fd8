"""Steps that are announced: blocks go where the step is fastest, which changes no result, and never beyond the budget.

On CPU the policy `auto` leaves all on the host. Here it is made to choose, as on a GPU, from passes timed on the CPU.
"""

import pytest

from horizon import MemoryConfig, runtime
from horizon.config.schema import Policy
from horizon.plan.lanes import BlockCost, StepCost
from horizon.plan.placement import Placer
from horizon.stream.prediction import Predictor
from tests.parity.reference import Resident, assert_same, build, engine_for, plain, streamed_step

LAYERS = 4


@pytest.fixture
def choosing(monkeypatch):
    monkeypatch.setattr(runtime, "read_policy", lambda *_: Placer(Policy.auto))


def model(tied=False):
    return build("llama", num_hidden_layers=LAYERS, tie_word_embeddings=tied)


def predicting(monkeypatch, seconds_of):
    """Have a step take `seconds_of(blocks in HBM)`, whatever was timed."""
    monkeypatch.setattr(Predictor, "cost", lambda self, needs, *_: taking(seconds_of(needs.in_hbm)))


def taking(seconds):
    """A step that does nothing for so long."""
    return StepCost(blocks=tuple(BlockCost(forward_s=(s,), backward_s=(0.0,), in_hbm=True) for s in (seconds, 0.0)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("fastest", [set(), {0}, {0, 5}, {0, 1, 2}], ids=str)
def test_blocks_go_where_the_step_is_fastest(monkeypatch, choosing, tied, fastest):
    if tied and fastest == {0, 1, 2}:
        fastest = {0, 1, 2, 5}
    predicting(monkeypatch, lambda in_hbm: 1.0 if in_hbm == fastest else 2.0)
    resident = Resident(model(tied))
    with engine_for(model(tied)) as engine:
        engine.plan_micro_batch(2, 12)
        assert engine._runtime.store.in_hbm == fastest
        assert engine.plan.prediction.seconds == 1.0
        for seed in range(3):
            assert_same(streamed_step(engine, [plain(seed)]), resident.step([plain(seed)]))
        assert engine._runtime.store.in_hbm == fastest  # the step that was announced moves nothing


def test_what_does_not_fit_is_not_chosen_however_fast(monkeypatch, choosing):
    predicting(monkeypatch, lambda in_hbm: 1.0 / (1 + len(in_hbm)))
    with engine_for(model()) as engine:
        engine.plan_micro_batch(2, 12)
        assert len(engine._runtime.store.in_hbm) == LAYERS + 2
        states = engine.plan.with_activations(()).num_bytes("device")
    with engine_for(model(), memory=MemoryConfig(device_budget=f"{states - 1}B")) as engine:
        engine.plan_micro_batch(2, 12)
        assert 0 < len(engine._runtime.store.in_hbm) < LAYERS + 2
        assert engine.plan.num_bytes("device") < states
        assert engine.step(plain(0)).loss > 0


def test_an_announced_step_moves_no_block_even_where_the_order_would_have_placed_others(monkeypatch, choosing):
    predicting(monkeypatch, lambda in_hbm: 1.0 if in_hbm == {0, LAYERS + 1} else 2.0)
    with engine_for(model()) as engine:
        engine.plan_micro_batch(2, 12)
        needed = engine.plan.num_bytes("device")
    with engine_for(model(), memory=MemoryConfig(device_budget=f"{needed}B")) as engine:
        engine.plan_micro_batch(2, 12)
        for seed in range(2):
            engine.step(plain(seed))
            assert engine._runtime.store.in_hbm == {0, LAYERS + 1}


def test_where_nothing_can_be_timed_the_policys_own_order_decides(monkeypatch, choosing):
    monkeypatch.setattr(Predictor, "time", lambda *_: False)
    with engine_for(model()) as engine:
        engine.plan_micro_batch(2, 12)
        assert engine.plan.prediction is None
        assert engine._runtime.store.in_hbm  # there is room for some
        assert engine.step(plain(0)).loss > 0


def test_each_kind_of_keeping_is_timed_once_for_a_shape(monkeypatch, choosing):
    seen = []
    with engine_for(model()) as engine:
        executor = engine._runtime.executor
        time_passes = executor.time_passes
        monkeypatch.setattr(executor, "time_passes", lambda *a, **k: (seen.append(set(a[2])), time_passes(*a, **k))[1])
        for _ in range(2):
            engine.plan_micro_batch(4, 12, 2)
        assert len(seen) == 1
        engine.plan_micro_batch(4, 12, 4)
        assert len(seen) == 2


# ---- slots


@pytest.fixture
def slotted(monkeypatch):
    """`slotted(seconds)`: copies run beside kernels, and a step with so many slots takes so long."""

    def slotted(seconds):
        monkeypatch.setattr(Predictor, "cost", lambda self, needs, *_: taking(seconds[needs.weight_slots]))
        monkeypatch.setattr(Predictor, "overlaps", True)

    return slotted


def slots_of(engine):
    slots = len(engine._runtime.executor._weights._slots)
    assert f"weight slots ({slots})" in engine.plan.table()
    return slots


@pytest.mark.parametrize(("third", "expected"), [(0.97, 3), (0.99, 2), (1.01, 2)])
def test_a_third_slot_is_there_where_steps_gain_by_it(slotted, third, expected):
    slotted({2: 1.0, 3: third})
    resident = Resident(model())
    with engine_for(model()) as engine:
        assert slots_of(engine) == 2  # until a step is announced
        for _ in range(2):
            engine.plan_micro_batch(2, 12)
            assert slots_of(engine) == expected and engine.plan.prediction.seconds == (third if expected == 3 else 1)
            for seed in range(2):
                assert_same(streamed_step(engine, [plain(seed)]), resident.step([plain(seed)]))
            assert slots_of(engine) == expected
        streamed_step(engine, [plain(0), plain(1)])  # which nobody announced: its memory was not looked at
        assert slots_of(engine) == 2


def test_an_explicit_number_of_slots_stays(slotted):
    slotted({1: 3.0, 2: 2.0, 3: 1.0})
    for number in (1, 2):
        with engine_for(model(), memory=MemoryConfig(weight_slots=number)) as engine:
            engine.plan_micro_batch(2, 12)
            assert slots_of(engine) == number


def test_a_third_slot_that_does_not_fit_is_not_there(slotted):
    slotted({2: 1.0, 3: 0.5})
    with engine_for(model()) as engine:
        engine.plan_micro_batch(2, 12)
        needed = engine.plan.with_activations(()).num_bytes("device")
    with engine_for(model(), memory=MemoryConfig(device_budget=f"{needed - 1}B")) as engine:
        engine.plan_micro_batch(2, 12)
        assert slots_of(engine) == 2


def test_where_copies_do_not_run_beside_kernels_there_is_no_third_slot(slotted, monkeypatch):
    slotted({2: 1.0, 3: 0.5})
    monkeypatch.setattr(Predictor, "overlaps", False)
    with engine_for(model()) as engine:
        engine.plan_micro_batch(2, 12)
        assert slots_of(engine) == 2
