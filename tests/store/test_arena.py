import gc
import mmap
import weakref

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon.errors import BudgetError
from horizon.store import arena
from horizon.store.arena import HUGE_PAGE, REGION_ALIGN, Arena
from horizon.units import MIB, align_up

SIZES = st.lists(st.one_of(st.integers(0, 9000), st.sampled_from([0, 4096, HUGE_PAGE, HUGE_PAGE + 1])), max_size=9)


@settings(max_examples=50, deadline=None)
@given(SIZES)
def test_regions_have_their_sizes_start_aligned_and_do_not_overlap(sizes):
    space = Arena(sizes, "test", pin=False)
    assert [region.numel() for region in space.regions] == sizes
    assert all(
        region.dtype == torch.uint8 and region.data_ptr() % REGION_ALIGN == 0
        for region in space.regions
        if region.numel()
    )
    for i, region in enumerate(space.regions):
        region.fill_(i + 1)
    assert all(bool((region == i + 1).all()) for i, region in enumerate(space.regions))
    assert sum(sizes) <= space.num_bytes <= sum(s + REGION_ALIGN for s in sizes) + HUGE_PAGE
    space.close()


def test_memory_is_zero_at_first():
    space = Arena([5000], "test", pin=False)
    assert not bool(space.regions[0].any())
    space.close()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 50), max_size=12).map(lambda pages: [p * REGION_ALIGN for p in pages]), st.integers(1, 60)
)
def test_no_region_straddles_two_registrations(sizes, piece_pages):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "PIECE", piece_pages * REGION_ALIGN)
        space = Arena(sizes, "test", pin=False)
        starts = [(torch.frombuffer(m, dtype=torch.uint8).data_ptr(), len(m)) for m in space._mappings]
        for region in space.regions:
            if region.numel():
                first, last = region.data_ptr(), region.data_ptr() + region.numel()
                assert sum(start <= first and last <= start + size for start, size in starts) == 1
        for _, size in starts:
            assert size <= max(arena.PIECE, HUGE_PAGE, *sizes)
        space.close()


def test_pages_come_into_being_ahead_of_use_with_what_they_hold():
    space = Arena([64 * MIB], "test", pin=False)
    space.regions[0][5] = 7
    before = psutil.Process().memory_info().rss
    if not space.populate(0, 64 * MIB):
        pytest.skip("this kernel cannot")
    assert psutil.Process().memory_info().rss - before > 56 * MIB
    assert space.regions[0][5] == 7
    assert not space.regions[0][6:].any()
    space.close()


def test_close_gives_the_memory_back_and_may_be_called_again():
    process = psutil.Process()
    space = Arena([64 * MIB], "test", pin=False)
    space.regions[0].fill_(1)
    used = process.memory_info().rss
    space.close()
    gc.collect()
    assert used - process.memory_info().rss > 48 * MIB
    assert space.regions == []
    space.close()


def test_close_gives_the_pages_back_even_while_a_view_is_alive():
    process = psutil.Process()
    space = Arena([64 * MIB], "test", pin=False)
    view = space.regions[0][:10]
    space.regions[0].fill_(1)
    used = process.memory_info().rss
    space.close()
    assert used - process.memory_info().rss > 48 * MIB
    assert not bool(view.any())  # still mapped, empty pages


@settings(max_examples=50, deadline=None)
@given(SIZES, st.data())
def test_a_released_region_is_gone_and_the_others_are_as_they_were(sizes, data):
    space = Arena(sizes, "test", pin=False)
    for i, region in enumerate(space.regions):
        region.fill_(i + 1)
    gone = data.draw(st.sets(st.integers(0, len(sizes) - 1))) if sizes else set()
    views, held = [region[:] for region in space.regions], space.num_bytes
    for i in gone:
        space.release(i)
        space.release(i)  # may be called again
    assert space.num_bytes == held - sum(align_up(sizes[i], REGION_ALIGN) for i in gone)
    for i, (region, view) in enumerate(zip(space.regions, views, strict=True)):
        assert region.numel() == (0 if i in gone else sizes[i])
        assert bool((view == (0 if i in gone else i + 1)).all())  # still mapped, empty pages
    space.close()


def test_refused_memory_is_a_budget_error_and_what_was_taken_is_given_back(monkeypatch):
    taken = []

    def refuse_the_second(*args, **kwargs):
        if taken:
            raise OSError(12, "Cannot allocate memory")
        mapping = mmap_class(*args, **kwargs)
        taken.append(weakref.ref(mapping))
        return mapping

    mmap_class = mmap.mmap
    monkeypatch.setattr(arena, "PIECE", REGION_ALIGN)
    monkeypatch.setattr(mmap, "mmap", refuse_the_second)
    with pytest.raises(BudgetError, match=r"refuses 4 KiB of host memory for exp_avg \(Cannot allocate memory\)"):
        Arena([4096, 4096], "exp_avg", pin=False)
    gc.collect()
    assert taken[0]() is None


@pytest.mark.gpu
def test_pinned_regions_are_registered_and_unregistered():
    for _ in range(3):  # memory unmapped while registered would make a later registration fail
        space = Arena([HUGE_PAGE, 0, 5000], "test", pin=True)
        assert all(region.is_pinned() for region in space.regions if region.numel())
        space.release(0)
        assert len(space._registered) == 1
        pointers = [region.data_ptr() for region in space.regions]
        space.close()
        assert space._registered == [] and len(set(pointers)) >= 2
