import threading

import pytest
import torch

from horizon.errors import HorizonError
from horizon.layout import ParamSpec, place_block
from horizon.store.gradients import KeptGradients, RingGradients

SIZES = (3000, 100, 5000)
LAYOUTS = tuple(place_block(i, f"b{i}", [ParamSpec(f"b{i}.w", "w", (n,))]) for i, n in enumerate(SIZES))


def in_thread(function, *args):
    """Start `function`; return (thread, list that receives what it returned or raised)."""
    outcome = []

    def body():
        try:
            outcome.append(function(*args))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread, outcome


@pytest.fixture(params=[torch.bfloat16, torch.float32])
def dtype(request):
    return request.param


@pytest.fixture
def ring(dtype):
    ring = RingGradients(LAYOUTS, dtype, pin=False, num_buffers=2)
    yield ring
    ring.close()


def test_kept_gradients_have_a_buffer_of_their_own_per_block(dtype):
    kept = KeptGradients(LAYOUTS, dtype, pin=False)
    for layout in LAYOUTS:
        buffer = kept.claim(layout.index)
        assert (buffer.shape, buffer.dtype) == ((layout.num_trainable,), dtype)
        buffer.fill_(layout.index + 1)
        kept.release(layout.index)
    for layout in LAYOUTS:
        assert bool((kept.claim(layout.index) == layout.index + 1).all())
    assert kept.num_bytes >= sum(lay.num_trainable for lay in LAYOUTS) * dtype.itemsize
    kept.close()
    kept.close()


def test_a_claimed_buffer_has_the_blocks_size_and_stays_the_same(ring, dtype):
    for layout in LAYOUTS:
        first, second = ring.claim(layout.index), ring.claim(layout.index)
        assert (first.shape, first.dtype) == ((layout.num_trainable,), dtype)
        assert first.data_ptr() == second.data_ptr()
        ring.release(layout.index)


def test_claims_held_together_do_not_overlap(ring):
    ring.claim(0).fill_(1)
    ring.claim(2).fill_(2)
    assert bool((ring.claim(0) == 1).all())


def test_a_ring_costs_the_largest_block_per_buffer(ring, dtype):
    largest = max(lay.num_trainable for lay in LAYOUTS)
    assert ring.num_bytes == 2 * largest * dtype.itemsize


def test_a_claim_waits_until_a_buffer_is_released(ring):
    first = ring.claim(0).data_ptr()
    ring.claim(1)
    thread, outcome = in_thread(ring.claim, 2)
    thread.join(0.05)
    assert outcome == []
    ring.release(0)
    thread.join(5)
    assert outcome[0].data_ptr() == first


def test_a_failure_wakes_whoever_waits_and_whoever_comes(ring):
    ring.claim(0)
    ring.claim(1)
    thread, outcome = in_thread(ring.claim, 2)
    error = ValueError("the update broke")
    ring.fail(error)
    ring.fail(ValueError("later"))
    thread.join(5)
    assert outcome == [error]
    with pytest.raises(ValueError, match="the update broke"):
        ring.claim(2)


def test_a_buffer_is_released_once(ring):
    ring.claim(1)
    ring.release(1)
    for block in (1, 2):
        with pytest.raises(HorizonError, match=f"gradient buffer of block {block} was released twice"):
            ring.release(block)


def test_close_may_be_called_again(ring):
    ring.close()
    ring.close()


def test_blocks_of_two_tiers_have_rings_of_their_own(dtype):
    rings = RingGradients(LAYOUTS, dtype, pin=False, num_buffers=1, in_hbm={0})
    assert rings.num_bytes == LAYOUTS[2].num_trainable * dtype.itemsize  # block 0's is not the host's
    rings.claim(2).fill_(1)
    rings.claim(0).fill_(2)  # waits for nobody
    assert bool((rings.claim(2) == 1).all())
    thread, outcome = in_thread(rings.claim, 1)
    rings.release(0)  # the other tier's
    thread.join(0.05)
    assert outcome == []
    rings.release(2)
    thread.join(5)
    assert outcome[0].shape == (LAYOUTS[1].num_trainable,)
    rings.release(1)
    rings.keep_in_hbm({1, 2})
    assert rings.claim(2).shape == (LAYOUTS[2].num_trainable,)
    assert rings.num_bytes == LAYOUTS[0].num_trainable * dtype.itemsize
    rings.close()
