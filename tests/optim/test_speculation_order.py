"""What is at work, waits or fails when a step is settled, dropped or stopped."""

import sys
import threading

import numpy as np
import pytest

from horizon.errors import ConfigError, HorizonError
from horizon.optim.speculation import FLOOR, Speculation
from tests.optim.test_speculation import Trained, exactly, largest_distance, ulps
from tests.optim.test_updater import ADAMW, assert_same, masters


def hold_first_chunk(trained):
    """Begin all blocks; returns when one thread has come to a chunk, where it stays for a moment."""
    reached, go_on = threading.Event(), threading.Event()
    speculate = trained.speculation._speculate

    def held(*arguments):
        if not reached.is_set():
            reached.set()
            assert go_on.wait(30)
        speculate(*arguments)

    trained.speculation._speculate = held
    for index in (3, 2, 1, 0):
        trained.speculation.speculate(index)
    assert reached.wait(30)
    threading.Timer(0.1, go_on.set).start()


def test_a_chunk_at_work_when_the_norm_is_known_is_not_given_to_another_thread():
    with Trained(num_threads=2, chunk_elements=1 << 21, num_blocks=4) as trained:
        hold_first_chunk(trained)
        trained.speculation.settle(1.0)
        trained.updater.wait_idle()
        assert_same(trained.host, exactly(1.0))


def test_a_chunk_at_work_when_the_step_is_dropped_is_given_back_too():
    with Trained(num_threads=1, chunk_elements=1 << 21) as trained:
        hold_first_chunk(trained)
        trained.speculation.undo()
        p, q = masters(trained.host.states[3]).numpy(), trained.before[3].numpy()
        assert ulps(p, q, p, q, np.full_like(p, FLOOR * ADAMW.lr)).max() <= 4


def test_pieces_that_wait_are_updated_when_the_norm_is_known():
    def stand_out(host):
        host.states[3].grads[70] = 0x4E6E  # 1e9 as bfloat16

    for scale in (1.0, 0.5):
        with Trained() as trained:
            stand_out(trained.host)
            expected = exactly(scale, stand_out)
            trained.speculate(3, 2)
            assert [sum(int(waits.sum()) for waits in trained.speculation._blocks[b].waits) for b in (3, 2)] == [1, 0]
            trained.speculation.settle(scale)
            trained.updater.wait()
            assert largest_distance(trained.host, expected) <= (0 if scale == 1 else 4)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_chunks_that_were_not_begun_when_the_norm_is_known_get_its_scale_at_once(scale):
    """One thread is held at its first chunk: all others of the blocks above are withdrawn, and block 0 comes first."""
    with Trained(num_threads=1) as trained:
        hold_first_chunk(trained)
        assert trained.speculation.settle(scale) == (0 if scale == 1 else 1)
        trained.updater.wait()
        assert trained.ledger.published == [(2, 0), (2, 1), (2, 2), (2, 3)]
        if scale == 1:
            assert_same(trained.host, exactly(1.0))
        else:
            assert largest_distance(trained.host, exactly(scale)) <= 4


def test_a_stop_leaves_what_was_not_begun_to_the_end():
    with Trained(num_threads=1) as trained:
        trained.speculate(3)
        trained.speculation.stop()
        assert trained.speculation.settle(0.5) == 1
        trained.updater.wait()
        assert largest_distance(trained.host, exactly(0.5)) <= 4


def test_frozen_blocks_are_published_when_the_step_is_settled():
    with Trained(frozen=(2,)) as trained:
        trained.speculate(3, 1)
        assert trained.ledger.version(2) == 1
        trained.speculation.settle(1.0)
        assert trained.ledger.version(2) == 2


@pytest.mark.parametrize("what", ["_speculate", "_settle", "_restore"])
def test_a_pass_that_fails_names_its_block_and_nobody_waits_in_vain(what):
    with Trained() as trained:

        def broken(*arguments):
            raise OSError("gone")

        setattr(trained.speculation, what, broken)
        with pytest.raises(
            HorizonError, match=r"the update of block \d \(block\.\d\) at step 2 failed: OSError\('gone'\)"
        ):
            trained.speculate(3, 2)
            if what == "_restore":
                trained.speculation.undo()
            trained.speculation.settle(0.5)
            trained.updater.wait()


def test_a_failure_elsewhere_ends_the_wait_for_the_threads():
    with Trained(num_threads=1) as trained:
        reached, go_on = threading.Event(), threading.Event()
        trained.speculation._speculate = lambda *arguments: (reached.set(), go_on.wait(30))
        trained.speculation.speculate(3)
        assert reached.wait(30)
        threading.Timer(0.05, trained.ledger.fail, [ValueError("the loader failed")]).start()
        with pytest.raises(ValueError, match="the loader failed"):
            trained.speculation.settle(0.5)
        go_on.set()


def test_without_numba_speculation_is_refused_by_name(monkeypatch):
    with Trained() as trained:
        monkeypatch.setitem(sys.modules, "numba", None)
        monkeypatch.delitem(sys.modules, "horizon.optim.kernel")
        with pytest.raises(ConfigError, match=r"clip=speculative needs numba .*optim\.clip=exact"):
            Speculation(trained.updater)
