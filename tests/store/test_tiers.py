import ctypes
import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon.errors import BudgetError
from horizon.layout import ParamSpec, place_block
from horizon.plan.machine import process_bytes
from horizon.store import tiers
from horizon.store.gradients import KeptGradients
from horizon.store.host import HostStore
from horizon.store.tiers import TieredState
from horizon.units import MIB

CPU = torch.device("cpu")
NUMELS = (300, 0, 5000, 70)
LAYOUTS = [place_block(i, f"b{i}", [ParamSpec(f"b{i}.w", "w", (n,)), ParamSpec(f"b{i}.f", "f", (9,), False)])
           for i, n in enumerate((300, 5000, 70))]  # fmt: skip
PLACEMENTS = st.lists(st.sets(st.integers(0, 3)), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(PLACEMENTS)
def test_blocks_keep_their_bits_wherever_they_move(placements):
    state = TieredState(NUMELS, torch.bfloat16, "test", False, CPU, placements[0])
    blocks = state.blocks
    assert not any(bool(block.any()) for block in blocks)
    values = [torch.randn(n).bfloat16() for n in NUMELS]
    for block, value in zip(blocks, values, strict=True):
        block.copy_(value)
    for in_hbm in placements:
        state.keep_in_hbm(in_hbm)
        assert state.blocks is blocks
        assert all(torch.equal(block, value) for block, value in zip(blocks, values, strict=True))
        on_host = [n * 2 for b, n in enumerate(NUMELS) if b not in in_hbm]
        assert sum(on_host) <= state.num_bytes <= sum(on_host) + 4096 * (len(NUMELS) + 1)
    state.close()
    state.close()


def test_a_block_that_moves_away_gives_its_pages_back():
    state = TieredState([16 * MIB] * 4, torch.float32, "test", False, CPU, set())
    for block in state.blocks:
        block.fill_(1)
    tensors = [state.blocks[0].data_ptr()]
    before = held_bytes()
    state.keep_in_hbm({0, 2})
    assert held_bytes() - before < 8 * MIB  # what it takes there it has given back here
    state.keep_in_hbm(set())
    assert held_bytes() - before < 8 * MIB
    assert state.blocks[0].data_ptr() not in tensors
    assert all(bool((block == 1).all()) for block in state.blocks)
    state.close()


def held_bytes():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return process_bytes()


def test_a_device_without_room_is_a_budget_error(monkeypatch):
    zeros = torch.zeros

    def refuse(*size, **kwargs):
        if kwargs.get("device") == CPU:
            raise torch.cuda.OutOfMemoryError
        return zeros(*size, **kwargs)

    state = TieredState(NUMELS, torch.float32, "exp_avg", False, CPU, set())
    monkeypatch.setattr(tiers.torch, "zeros", refuse)
    message = r"the device has no 1.17 KiB left for exp_avg of block 0; use a smaller memory.hbm_blocks"
    with pytest.raises(BudgetError, match=message):
        TieredState(NUMELS, torch.float32, "exp_avg", False, CPU, {0})
    with pytest.raises(BudgetError, match=message):
        state.keep_in_hbm({0})
    state.close()


@settings(max_examples=30, deadline=None)
@given(PLACEMENTS)
def test_a_store_reads_back_by_name_what_was_written_on_another_tier(placements):
    placements = [in_hbm & {0, 1, 2} for in_hbm in placements]
    store = HostStore(LAYOUTS, False, False, CPU, placements[0])
    values = {p.name: torch.randn(p.spec.shape) for lay in LAYOUTS for p in lay.params}
    for name, value in values.items():
        store.write_master(name, value)
    for in_hbm in placements:
        store.keep_in_hbm(in_hbm)
        assert store.in_hbm == in_hbm
        assert all(torch.equal(store.read_master(name), value) for name, value in values.items())
        for kind, num_bytes in store.num_bytes.items():
            per = {"weights": 2, "residual": 2}.get(kind, 4)
            sizes = [lay.num_elements if per == 2 else lay.num_trainable for lay in LAYOUTS if lay.index not in in_hbm]
            assert per * sum(sizes) <= num_bytes <= per * sum(sizes) + 4096 * 4
    store.close()


def test_kept_gradients_move_with_their_block():
    kept = KeptGradients(LAYOUTS, torch.float32, False, CPU, {1})
    for layout in LAYOUTS:
        kept.claim(layout.index).fill_(layout.index + 1)
    for in_hbm in ({0, 2}, {0}, set()):
        kept.keep_in_hbm(in_hbm)
        assert kept.in_hbm == in_hbm
        assert all(bool((kept.claim(b) == b + 1).all()) for b in range(3))
    kept.close()
