"""Keys and values: the device first, then the host, never more than either may hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horizon.errors import BudgetError
from horizon.plan.kv_cache import LayerCache, plan_cache
from horizon.plan.memory import Limits, Line, MemoryPlan

KEPT = Line("host", "left by steps", 10)


def fixed(host, device):
    return MemoryPlan(
        4, 100, (Line("device", "slots", 100), Line("host", "weights", 100)), Limits(host, device), (KEPT,)
    )


@given(
    layers=st.lists(
        st.builds(LayerCache, st.integers(1, 9), st.none() | st.integers(2, 6)), min_size=1, max_size=8
    ),
    rows=st.integers(1, 4),
    tokens=st.integers(1, 12),
    host=st.integers(110, 900),
    device=st.integers(100, 600),
    working=st.integers(0, 100),
)  # fmt: skip
def test_every_layer_is_somewhere_and_budgets_hold(layers, rows, tokens, host, device, working):
    sizes = [rows * layer.token_bytes * min(tokens, (layer.window or 100) - 1) for layer in layers]
    try:
        planned = plan_cache(fixed(host, device), layers, rows, tokens, working)
    except BudgetError:
        away = sum(sizes) > device - 100 - working
        assert away and (device - 100 - working < max(sizes) or host - 110 < sum(sizes))
        return
    on_device = sum(size for layer, size in enumerate(sizes) if layer in planned.on_device)
    borrowed = max(sizes) if on_device < sum(sizes) else 0
    assert planned.memory.num_bytes("device") == 100 + working + on_device + borrowed <= device
    assert planned.memory.num_bytes("host") == 110 + sum(sizes) - on_device <= host
    if sum(sizes) <= device - 100 - working:
        assert planned.on_device == set(range(len(layers)))
    else:  # no layer that is away would have found room
        left = device - planned.memory.num_bytes("device")
        assert all(sizes[layer] > left for layer in range(len(layers)) if layer not in planned.on_device)


def test_a_refusal_names_the_tier_and_what_helps():
    with pytest.raises(BudgetError, match=r"of host memory.*keys and values of 2 layers.*a smaller max_new_tokens"):
        plan_cache(fixed(200, 200), [LayerCache(9), LayerCache(9)], 1, 9, 0)
    with pytest.raises(BudgetError, match="of device memory"):
        plan_cache(fixed(2000, 150), [LayerCache(9), LayerCache(9)], 1, 9, 0)
