import weakref

import pytest
import torch

from horizon.plan.activations import LOOKAHEAD
from horizon.store.offload import HostRegions
from horizon.stream.boundaries import Boundaries
from horizon.stream.streams import Streams

ROWS, TOKENS, HIDDEN = 2, 3, 8
STREAMS = Streams.on(torch.device("cpu"))
KEYS = [(block, m) for block in (1, 2, 3) for m in (0, 1)]
BACKWARD = [(block, m) for block in (3, 2, 1) for m in (0, 1)]


def hidden(key, dtype):
    generator = torch.Generator().manual_seed(10 * key[0] + key[1])
    return torch.randn(ROWS, TOKENS, HIDDEN, generator=generator).to(dtype)


def host_space(keys, num_bytes=1000):
    """In two pieces, the first of which is too small."""
    return {key: list(torch.full((num_bytes,), 0xAB, dtype=torch.uint8).split([16, num_bytes - 16])) for key in keys}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "offloaded", [[], [(3, 0), (3, 1)], [(2, 1)], KEYS], ids=["none", "one block", "one micro-batch", "all"]
)
def test_boundaries_come_back_bit_for_bit_in_the_order_of_backward(offloaded, dtype):
    boundaries = Boundaries(STREAMS, HostRegions(host_space(offloaded)))
    for key in KEYS:
        boundaries.save(key, hidden(key, dtype))
    for key in KEYS:
        boundaries.read(key)
    boundaries.begin_backward(BACKWARD)
    for key in BACKWARD:
        back = boundaries.take(key)
        assert back.dtype == dtype
        assert torch.equal(back, hidden(key, dtype)), key


def test_an_offloaded_boundary_gives_its_device_memory_back_once_it_was_read_and_others_when_taken():
    boundaries = Boundaries(STREAMS, HostRegions(host_space([(1, 0)])))
    gone, kept = hidden((1, 0), torch.float32), hidden((2, 0), torch.float32)
    references = weakref.ref(gone), weakref.ref(kept)
    boundaries.save((1, 0), gone)
    boundaries.save((2, 0), kept)
    del gone, kept
    assert references[0]() is not None  # the next block has yet to read it
    boundaries.read((1, 0))
    boundaries.read((2, 0))
    assert references[0]() is None
    assert references[1]() is not None
    boundaries.begin_backward([(2, 0), (1, 0)])
    taken = boundaries.take((2, 0))
    assert references[1]() is taken
    del taken
    assert references[1]() is None


def test_only_a_few_boundaries_are_on_their_way_back_at_once():
    asked = []

    class Counting(Streams):
        def empty(self, *shape, dtype):
            asked.append(weakref.ref(result := super().empty(*shape, dtype=dtype)))
            return result

    boundaries = Boundaries(Counting.on(torch.device("cpu")), HostRegions(host_space(KEYS)))
    for key in KEYS:
        boundaries.save(key, hidden(key, torch.float32))
        boundaries.read(key)
    boundaries.begin_backward(BACKWARD)
    for key in BACKWARD:
        assert sum(reference() is not None for reference in asked) <= LOOKAHEAD
        boundaries.take(key)
    assert len(asked) == len(KEYS)


def test_backward_that_ends_early_brings_back_only_what_it_needs():
    space = host_space(KEYS)
    boundaries = Boundaries(STREAMS, HostRegions(space))
    for key in KEYS:
        boundaries.save(key, hidden(key, torch.float32))
        boundaries.read(key)
    boundaries.begin_backward([(3, 0), (3, 1)])
    for key in ((3, 0), (3, 1)):
        assert torch.equal(boundaries.take(key), hidden(key, torch.float32))
    with pytest.raises(KeyError):
        boundaries.take((2, 0))


def test_a_boundary_uses_the_front_of_its_region_and_leaves_the_rest():
    space = host_space([(1, 0)])
    boundaries = Boundaries(STREAMS, HostRegions(space))
    boundaries.save((1, 0), hidden((1, 0), torch.bfloat16))
    num_bytes = ROWS * TOKENS * HIDDEN * 2
    assert torch.equal(
        torch.cat(space[1, 0])[:num_bytes].view(torch.bfloat16), hidden((1, 0), torch.bfloat16).flatten()
    )
    assert bool((torch.cat(space[1, 0])[num_bytes:] == 0xAB).all())
