import math
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from horizon.layout import BLOCK_ALIGN, PARAM_ALIGN, ParamSpec, place_block

SHAPES = st.lists(st.integers(1, 60), max_size=3).map(tuple)
SPECS = st.lists(st.tuples(SHAPES, st.booleans()), max_size=12).map(
    lambda specs: [ParamSpec(f"block.p{i}", f"p{i}", shape, trainable) for i, (shape, trainable) in enumerate(specs)]
)


def owner(specs):
    return place_block(0, "owner", [ParamSpec(f"o{i}", f"o{i}", s.shape, s.trainable) for i, s in enumerate(specs)])


@settings(max_examples=100, deadline=None)
@given(SPECS, SPECS)
def test_every_parameter_has_one_place_and_no_two_overlap(specs, lent):
    borrowed = [(f"alias{i}", 0, param) for i, param in enumerate(owner(lent).params)]
    layout = place_block(3, "block", specs, borrowed)
    ranges = sorted((offset, offset + math.prod(shape), name) for name, offset, shape in layout.slot_ranges())
    assert sorted(name for _, _, name in ranges) == sorted([s.local_name for s in specs] + [b[0] for b in borrowed])
    for (_, end, _), (start, _, _) in pairwise(ranges):
        assert end <= start
    assert all(start % PARAM_ALIGN == 0 for start, _, _ in ranges)
    assert all(end <= layout.num_slot_elements for _, end, _ in ranges)


@settings(max_examples=100, deadline=None)
@given(SPECS, SPECS)
def test_trainable_frozen_and_borrowed_parameters_stand_in_this_order_in_whole_pages(specs, lent):
    borrowed = [(f"alias{i}", 0, param) for i, param in enumerate(owner(lent).params)]
    layout = place_block(3, "block", specs, borrowed)
    edges = layout.num_trainable, layout.num_elements, layout.num_slot_elements
    assert all(edge % BLOCK_ALIGN == 0 for edge in edges) and list(edges) == sorted(edges)
    for param in layout.params:
        low, high = (0, edges[0]) if param.spec.trainable else edges[:2]
        assert low <= param.offset and param.end <= high
    assert all(edges[1] <= b.offset and b.end <= edges[2] for b in layout.borrowed)
    assert [p.name for p in layout.params] == [s.name for s in sorted(specs, key=lambda s: not s.trainable)]


@settings(max_examples=100, deadline=None)
@given(SPECS, SPECS)
def test_gradients_exist_for_what_is_trained_borrowed_or_not(specs, lent):
    borrowed = [(f"alias{i}", 0, param) for i, param in enumerate(owner(lent).params)]
    layout = place_block(3, "block", specs, borrowed)
    places = {name: (offset, shape) for name, offset, shape in layout.slot_ranges()}
    wanted = {s.local_name for s in specs if s.trainable} | {alias for alias, _, p in borrowed if p.spec.trainable}
    assert {name: (offset, shape) for name, offset, shape in layout.grad_ranges()} == {n: places[n] for n in wanted}
    assert [p.name for p in layout.trainable] == [s.name for s in specs if s.trainable]
    ends = [offset + math.prod(shape) for _, offset, shape in layout.grad_ranges()]
    assert max(ends, default=0) <= layout.num_grad_elements <= max(ends, default=0) + BLOCK_ALIGN + PARAM_ALIGN
    assert layout.num_grad_elements % BLOCK_ALIGN == 0


def test_a_layout_by_hand():
    lent = owner([ParamSpec("o", "o", (3, 3))]).params[0]
    specs = [
        ParamSpec("b.frozen", "frozen", (2048,), False),
        ParamSpec("b.w", "w", (5, 13)),  # 65 elements: one more than a multiple
        ParamSpec("b.scalar", "scalar", ()),
    ]
    layout = place_block(2, "b", specs, [("tied", 0, lent)])
    assert [(p.name, p.offset, p.end) for p in layout.params] == [
        ("b.w", 0, 65),
        ("b.scalar", 128, 129),
        ("b.frozen", 2048, 4096),
    ]
    assert (layout.num_trainable, layout.num_elements, layout.num_slot_elements) == (2048, 4096, 6144)
    assert [(b.local_name, b.owner, b.offset, b.end) for b in layout.borrowed] == [("tied", 0, 4096, 4105)]


def test_a_block_without_parameters_takes_no_room():
    layout = place_block(0, "empty", [])
    assert (layout.num_trainable, layout.num_elements, layout.num_slot_elements) == (0, 0, 0)
