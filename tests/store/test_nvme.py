"""The nvme tier's file: where states lie in it, any range of them, and how it fails."""

import errno
import os
from itertools import pairwise
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon.config.schema import Moments, NvmeEngine, Tier
from horizon.errors import BudgetError, ConfigError, TierError
from horizon.layout import ParamSpec, place_block
from horizon.plan.disk import (
    DISK_BLOCK,
    LARGE_REGION,
    PAGE_ELEMENTS,
    DiskMap,
    Region,
    load_buffer_bytes,
    load_parts,
    map_disk,
    num_pages,
    page_range,
    page_spans,
    staged_parts,
    update_page_bytes,
)
from horizon.plan.states import MASTER, MOMENTS
from horizon.store.arena import Arena
from horizon.store.disk import DirectFile, takes_direct
from horizon.store.nvme import Move, NvmeTier, as_bytes, open_nvme
from horizon.store.zarr import ZarrStates

STATES = {moments: (*MASTER, *MOMENTS[moments]) for moments in Moments}


def block(index, trained, frozen, borrows=None):
    specs = [ParamSpec(f"{index}.t", "t", (trained,)), ParamSpec(f"{index}.f", "f", (frozen,), trainable=False)]
    borrowed = [("b", 0, borrows.params[0])] if borrows is not None else []
    return place_block(index, f"b{index}", [s for s in specs if s.numel], borrowed)


@st.composite
def placements(draw):
    """Layouts of a few blocks, the last of which borrows from the first, and what of them is on nvme."""
    sizes = st.sampled_from([0, 64, 5000, 70_000, 1 << 22, PAGE_ELEMENTS - 1, PAGE_ELEMENTS, 2 * PAGE_ELEMENTS + 999])
    layouts = [block(0, draw(sizes.filter(bool)), 0)]
    layouts += [block(i, draw(sizes), draw(sizes)) for i in range(1, draw(st.integers(1, 3)))]
    layouts.append(block(len(layouts), 64, 0, layouts[0]))
    states = STATES[draw(st.sampled_from(list(Moments)))]
    places = [(state.name, lay.index) for state in states for lay in layouts]
    return states, layouts, dict.fromkeys(draw(st.lists(st.sampled_from(places), unique=True)), Tier.nvme)


@settings(max_examples=200, deadline=None)
@given(placements())
def test_every_state_on_nvme_has_whole_disk_blocks_of_its_own(case):
    states, layouts, placed = case
    disk_map = map_disk(states, layouts, placed)
    kinds = {state.name: state for state in states}
    assert disk_map.regions.keys() == placed.keys()
    regions = sorted(disk_map.regions.values())
    assert all(a.offset + a.num_bytes <= b.offset for a, b in pairwise(regions))
    assert disk_map.num_bytes == max((r.offset + r.num_bytes for r in regions), default=0)
    for (name, index), region in disk_map.regions.items():
        assert region.offset % (LARGE_REGION if region.num_bytes >= LARGE_REGION else DISK_BLOCK) == 0
        assert region.num_bytes % DISK_BLOCK == 0
        assert 0 <= region.num_bytes - kinds[name].num_bytes(layouts[index]) < DISK_BLOCK


@settings(max_examples=200, deadline=None)
@given(placements())
def test_pages_cut_the_trainable_elements_of_every_state_at_whole_disk_blocks(case):
    states, layouts, placed = case
    regions = map_disk(states, layouts, placed).regions
    for layout in layouts:
        paged = [state for state in states if (state.name, layout.index) in placed]
        ends = dict.fromkeys([state.name for state in paged], 0)
        for page in range(num_pages(layout)):
            spans = page_spans(paged, layout, page)
            first, end = page_range(layout, page)
            assert first < end <= layout.num_trainable
            assert sum(size for _, size in spans.values()) <= update_page_bytes(states, layouts, placed)
            for state in paged:
                offset, num_bytes = spans[state.name]
                assert offset == ends[state.name] and offset % DISK_BLOCK == num_bytes % DISK_BLOCK == 0
                assert offset + num_bytes <= regions[state.name, layout.index].num_bytes
                ends[state.name] += num_bytes
                assert offset == state.span(first, end).start * state.dtype.itemsize
        for state in paged:
            assert ends[state.name] >= state.span(0, layout.num_trainable).stop * state.dtype.itemsize


@settings(max_examples=200, deadline=None)
@given(placements(), st.booleans())
def test_a_load_stages_all_that_a_slot_needs_from_disk(case, fp32):
    states, layouts, placed = case
    loaded = [s for s in states if s.name == "weights" or (fp32 and s.name == "residual")]
    regions = map_disk(states, layouts, placed).regions
    for layout in layouts:
        parts, num_bytes = staged_parts(loaded, layout, placed)
        assert num_bytes <= load_buffer_bytes(loaded, layouts, placed)
        wanted = {
            (state.name, part)
            for state in loaded
            for part in load_parts(layout)
            if (state.name, part.owner) in placed and part.stop > part.start
        }
        assert {(p.state, p.part) for p in parts} == wanted
        end = 0
        for p in parts:
            assert p.place == end and p.offset % DISK_BLOCK == p.num_bytes % DISK_BLOCK == 0
            assert p.offset + p.skip == p.part.start * 2
            assert p.skip + (p.part.stop - p.part.start) * 2 <= p.num_bytes
            assert p.offset + p.num_bytes <= regions[p.state, p.part.owner].num_bytes
            end += p.num_bytes


# ---- moves


ENGINES = pytest.mark.parametrize("engine", [NvmeEngine.direct, NvmeEngine.tensorstore])
A, B = ("weights", 0), ("residual", 1)
TWO = DiskMap(
    {A: Region(0, 40 * DISK_BLOCK, 8 * DISK_BLOCK), B: Region(40 * DISK_BLOCK, 9 * DISK_BLOCK, 16 * DISK_BLOCK)},
    49 * DISK_BLOCK,
)


@pytest.fixture
def tier(tmp_path):
    opened = open_nvme(str(tmp_path), NvmeEngine.direct, TWO)
    yield opened
    opened.close()


def test_what_was_never_written_is_zero_and_the_file_has_no_name(tier, tmp_path):
    found = torch.ones(40 * DISK_BLOCK, dtype=torch.uint8)
    tier.read_range(A, 0, found)
    assert not found.any()
    assert list(tmp_path.iterdir()) == []


@ENGINES
@settings(max_examples=40, deadline=None)
@given(
    ranges=st.lists(st.tuples(st.booleans(), st.integers(0, 36_000), st.integers(1, 36_000)), min_size=1, max_size=8)
)
def test_any_range_can_be_read_and_written(tmp_path_factory, engine, ranges):
    folder = tmp_path_factory.mktemp("nvme")
    opened = open_nvme(str(folder), engine, TWO)
    with mock.patch("horizon.store.nvme.BOUNCE", 4 * DISK_BLOCK):
        expected = {
            A: torch.zeros(40 * DISK_BLOCK, dtype=torch.uint8),
            B: torch.zeros(9 * DISK_BLOCK, dtype=torch.uint8),
        }
        for number, (first, start, size) in enumerate(ranges):
            place = A if first else B
            start %= expected[place].numel()
            size = min(size, expected[place].numel() - start)
            value = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
            opened.write_range(place, start, value)
            expected[place][start : start + size] = value
        for place, bytes_ in expected.items():
            found = torch.zeros_like(bytes_)
            opened.read_range(place, 0, found)
            assert torch.equal(found, bytes_)
            part = torch.zeros(1001, dtype=torch.uint8)
            opened.read_range(place, 777, part)
            assert torch.equal(part, bytes_[777:1778])
    opened.close()
    assert list(folder.iterdir()) == []


def test_a_move_outside_its_state_is_a_mistake(tmp_path):
    file = DirectFile(tmp_path, TWO)
    data = memoryview(bytearray(DISK_BLOCK))
    for offset in (-DISK_BLOCK, 9 * DISK_BLOCK, 100):
        with pytest.raises(RuntimeError, match="not in it"):
            file.write(B, offset, data)
    file.close()
    file.close()


# ---- what can go wrong


def test_a_disk_without_room_is_refused_at_once(tmp_path):
    with (
        mock.patch("os.posix_fallocate", side_effect=OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(BudgetError, match=r"memory.nvme_dir=.* has no room for 196 KiB of states"),
    ):
        DirectFile(tmp_path, TWO)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(TierError, match="gone cannot hold states"):
        DirectFile(tmp_path / "gone", TWO)
    with pytest.raises(TierError, match="gone cannot hold states"):
        takes_direct(tmp_path / "gone")


def test_a_file_system_without_direct_io_goes_through_the_page_cache_and_says_so(tmp_path, caplog):
    real = os.open

    def refuse(path, flags, *args):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args)

    with mock.patch("os.open", refuse):
        file = DirectFile(tmp_path, TWO)
        assert not file.direct and not takes_direct(tmp_path)
    assert "refuses O_DIRECT" in caplog.text
    file.write(A, 0, memoryview(b"x" * DISK_BLOCK))
    found = bytearray(DISK_BLOCK)
    file.read(A, 0, memoryview(found))
    assert found == b"x" * DISK_BLOCK
    file.close()


@pytest.mark.parametrize(
    ("call", "fault", "message"),
    [
        ("preadv", OSError(errno.EIO, "Input/output error"), "reading weights of block 0 .*Input/output error"),
        ("preadv", 0, "reading weights of block 0 .*only 0 bytes were read"),
        ("preadv", 100, "reading weights of block 0 .*only 100 bytes were read"),
        ("pwritev", 0, "writing weights of block 0 .*only 0 bytes were written"),
        ("pwritev", OSError(errno.ENOSPC, "No space left on device"), "writing weights of block 0 .*No space left"),
    ],
    ids=str,
)
def test_a_failed_move_names_what_it_was_and_nothing_moves_after_it(tier, call, fault, message):
    data = torch.zeros(DISK_BLOCK, dtype=torch.uint8)
    effect = {"side_effect": fault} if isinstance(fault, Exception) else {"return_value": fault}
    with mock.patch(f"os.{call}", **effect), pytest.raises(TierError, match=message):
        tier.run([Move(A, 0, data, call == "pwritev")])
    with pytest.raises(TierError, match=message):
        tier.run([Move(B, 0, data, True)])


def test_half_a_move_goes_on_where_it_stopped(tier):
    real, (data, found) = os.pwritev, Arena([8 * DISK_BLOCK] * 2, "test", pin=False).regions
    data.copy_(torch.arange(8 * DISK_BLOCK))
    with mock.patch("os.pwritev", lambda fd, buffers, offset: real(fd, [buffers[0][:DISK_BLOCK]], offset)):
        tier.run([Move(A, DISK_BLOCK, data, True)])
    tier.run([Move(A, DISK_BLOCK, found, False)])
    assert torch.equal(found, data)


def test_the_first_of_several_errors_is_told_once(tmp_path):
    class Broken:
        def piece_bytes(self, place):
            return DISK_BLOCK

        def read(self, place, offset, into):
            raise OSError(errno.EIO, f"at {offset}")

        write = read

        def close(self):
            pass

    tier, told = NvmeTier(tmp_path, Broken()), []
    tier.start([Move(A, 0, torch.zeros(5 * DISK_BLOCK, dtype=torch.uint8), False)], told.append)
    tier.close()
    assert len(told) == 1 and isinstance(told[0], TierError)


def test_bytes_of_a_tensor_are_its_own():
    value = torch.zeros(3, dtype=torch.float32)
    as_bytes(value)[3] = 0x40
    assert value.tolist() == [2.0, 0.0, 0.0]


# ---- the portable engine


def test_a_chunk_that_was_written_and_is_gone_is_an_error_and_not_zeros(tmp_path):
    opened = open_nvme(str(tmp_path), NvmeEngine.tensorstore, TWO)
    data = torch.full((8 * DISK_BLOCK,), 7, dtype=torch.uint8)
    opened.run([Move(A, 8 * DISK_BLOCK, data, True)])
    (chunk,) = (path for path in tmp_path.rglob("c/*") if path.is_file())
    chunk.unlink()
    opened.run([Move(A, 0, data, False)])
    assert not data.any()  # never written
    with pytest.raises(TierError, match=r"reading weights of block 0 in memory.nvme_dir=.* failed"):
        opened.run([Move(A, 8 * DISK_BLOCK, data, False)])
    opened.close()


def test_zeros_that_were_written_are_there(tmp_path):
    opened = open_nvme(str(tmp_path), NvmeEngine.tensorstore, TWO)
    data = torch.zeros(8 * DISK_BLOCK, dtype=torch.uint8)
    opened.run([Move(A, 0, data, True)])
    data.fill_(1)
    opened.run([Move(A, 0, data, False)])
    assert not data.any()
    opened.close()


def test_it_is_taken_where_direct_io_is_not_to_be_had(tmp_path, caplog):
    with mock.patch("horizon.store.nvme.takes_direct", lambda folder: False), caplog.at_level("INFO"):
        opened = open_nvme(str(tmp_path), NvmeEngine.auto, TWO)
    assert isinstance(opened._engine, ZarrStates) and "zarr3 arrays" in caplog.text
    opened.close()
    with mock.patch("horizon.store.nvme.takes_direct", lambda folder: True):
        opened = open_nvme(str(tmp_path), NvmeEngine.auto, TWO)
    assert isinstance(opened._engine, DirectFile)
    opened.close()


def test_without_the_package_it_is_refused(tmp_path):
    with (
        mock.patch("horizon.store.zarr.has_tensorstore", lambda: False),
        pytest.raises(ConfigError, match="nvme_engine=tensorstore needs the package of that name"),
    ):
        open_nvme(str(tmp_path), NvmeEngine.tensorstore, TWO)


def test_a_disk_without_room_is_refused_by_it_too(tmp_path):
    with (
        mock.patch("shutil.disk_usage", lambda folder: mock.Mock(free=1000)),
        pytest.raises(BudgetError, match=r"no room for 196 KiB of states \(1000 B are free\)"),
    ):
        open_nvme(str(tmp_path), NvmeEngine.tensorstore, TWO)
    assert list(tmp_path.iterdir()) == []
