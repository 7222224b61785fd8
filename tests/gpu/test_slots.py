"""A third weight slot that the plan takes: it is there, in the plan's bytes, and changes no result."""

import pytest

import horizon
from tests.gpu.models import batches, engine
from tests.gpu.test_memory import MEDIUM, MIB, TOKENS, VOCAB

pytestmark = pytest.mark.gpu


def test_a_third_slot_is_planned_and_changes_no_loss(monkeypatch):
    found = {}
    for worth in (False, True):
        monkeypatch.setattr("horizon.planner.worth_a_slot", lambda now, then, worth=worth: worth)
        memory = horizon.MemoryConfig(policy="dram")
        with engine(MEDIUM, compute_dtype="bfloat16", memory=memory) as streamed:
            rows = streamed.plan_micro_batch(8, TOKENS)
            assert f"weight slots ({2 + worth})" in streamed.plan.table()
            steps = [batches(8 // rows, rows=rows, tokens=TOKENS, vocab=VOCAB, seed=seed) for seed in range(3)]
            found[worth] = [streamed.step(step).loss for step in steps]
            assert streamed.device_bytes <= streamed.plan.num_bytes("device") + 256 * MIB
    assert found[True] == pytest.approx(found[False], rel=1e-3)
