from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon.plan.activations import BORROW_ALIGN, borrow, own_bytes
from horizon.store.offload import OffloadSpace
from horizon.units import align_up

BLOCKS = 6
CASES = st.tuples(
    st.dictionaries(st.tuples(st.integers(1, BLOCKS), st.integers(0, 2)), st.integers(1, 3000), max_size=18),
    st.lists(st.sampled_from([0, 200, 256, 1024, 4096, 9000]), min_size=1, max_size=BLOCKS + 1),
)


@settings(max_examples=300, deadline=None)
@given(CASES)
def test_a_boundary_lies_in_buffers_of_earlier_blocks_only_and_never_on_another(case):
    sizes, idle = case
    placed, homeless = borrow(sizes, idle)
    taken = []
    for key, pieces in placed.items():
        assert sum(piece.num_bytes for piece in pieces) + homeless.get(key, 0) == sizes[key]
        for buffer, offset, num_bytes in pieces:
            assert buffer < key[0] and num_bytes > 0
            assert offset % BORROW_ALIGN == 0 and offset + num_bytes <= idle[buffer]
            taken.append((buffer, offset, offset + num_bytes))
    for one, other in pairwise(sorted(taken)):
        assert one[0] < other[0] or one[2] <= other[1]


@settings(max_examples=300, deadline=None)
@given(CASES)
def test_what_found_no_room_would_fit_nowhere(case):
    sizes, idle = case
    placed, homeless = borrow(sizes, idle)
    used = [0] * len(idle)
    for pieces in placed.values():
        for buffer, offset, num_bytes in pieces:
            used[buffer] = max(used[buffer], align_up(offset + num_bytes, BORROW_ALIGN))
    for block, _ in homeless:
        assert all(used[b] + BORROW_ALIGN > idle[b] for b in range(min(block, len(idle))))
    assert own_bytes(sizes, idle) == sum(align_up(num_bytes, BORROW_ALIGN) for num_bytes in homeless.values())


@settings(max_examples=100, deadline=None)
@given(CASES)
def test_regions_have_their_sizes_and_keep_what_is_written(case):
    sizes, idle = case
    buffers = [torch.zeros(n // 2, dtype=torch.bfloat16) for n in idle]
    space = OffloadSpace(pin=False)
    regions = space.regions(sizes, buffers)
    assert {key: sum(piece.numel() for piece in pieces) for key, pieces in regions.items()} == sizes
    for i, key in enumerate(sorted(regions)):
        for piece in regions[key]:
            piece.fill_(i + 1)
    for i, key in enumerate(sorted(regions)):
        assert all(bool((piece == i + 1).all()) for piece in regions[key])
    space.close()


def test_borrowed_regions_are_the_buffers_memory_and_cost_none():
    buffer = torch.zeros(1024, dtype=torch.float32)
    space = OffloadSpace(pin=False)
    (region,) = space.regions({(1, 0): 4096}, [buffer])[1, 0]
    assert region.data_ptr() == buffer.data_ptr()
    assert space._own is None


def test_its_own_memory_is_kept_and_grows():
    space = OffloadSpace(pin=False)
    first = space.regions({(1, 0): 5000}, [])[1, 0][0].data_ptr()
    assert space.regions({(1, 0): 4000}, [])[1, 0][0].data_ptr() == first
    grown = space.regions({(1, 0): 5000, (2, 0): 90000}, [])
    grown[2, 0][0].fill_(1)
    assert grown[1, 0][0].numel() == 5000
    space.close()
    space.close()
