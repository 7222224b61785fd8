"""Updates that fail, cannot begin or end early: whoever waits hears of it."""

import threading

import numpy as np
import pytest

from horizon.errors import HorizonError, NonFiniteError
from horizon.optim.states import UpdateStates
from horizon.store.ledger import Ledger
from tests.optim.test_updater import Host, block, updater_of


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_worker_that_raises_stops_everything_and_names_the_block(num_threads):
    layouts = [block(index) for index in range(6)]
    host, ledger = Host(layouts), Ledger(6)

    def broken(index):
        if index == 2:
            raise OSError("disk gone")
        return host(index)

    updater = updater_of(layouts, broken, ledger, num_threads, chunk_elements=64)
    updater.submit(1, 1e-2, 1.0)
    with pytest.raises(
        HorizonError, match=r"update of block 2 \(block\.2\) at step 1 failed: OSError\('disk gone'\)"
    ) as caught:
        updater.wait()
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(HorizonError, match="block 2"):
        updater.submit(2, 1e-2, 1.0)
    updater.close()
    assert [ledger.version(index) for index in (2, 3, 4, 5)] == [0] * 4
    assert 3 not in host.asked


def test_states_that_do_not_fit_the_layout_are_refused_before_the_kernel_sees_them():
    layouts = [block(0)]
    host = Host(layouts)
    states = host.states[0]
    host.states[0] = UpdateStates(*states.arrays()[:4], states.grads[:-1])
    updater = updater_of(layouts, host, Ledger(1), num_threads=1)
    updater.submit(1, 1e-2, 1.0)
    with pytest.raises(HorizonError, match="state grads is uint16"):
        updater.wait()
    updater.close()


def test_a_failure_elsewhere_stops_the_workers():
    layouts = [block(index) for index in range(3)]
    host, ledger, gate = Host(layouts), Ledger(3), threading.Event()

    def gated(index):
        gate.wait(10)
        return host(index)

    updater = updater_of(layouts, gated, ledger, num_threads=1, chunk_elements=64)
    updater.submit(1, 1e-2, 1.0)
    ledger.fail(ValueError("the loader failed"))
    gate.set()
    with pytest.raises(ValueError, match="the loader failed"):
        updater.wait()
    updater.close()
    assert 1 not in host.asked


def test_close_is_idempotent_joins_its_threads_and_ends_all_waiting():
    layouts = [block(index) for index in range(3)]
    host, ledger, gate, asked = Host(layouts), Ledger(3), threading.Event(), threading.Event()

    def gated(index):
        asked.set()
        gate.wait(10)
        return host(index)

    before = set(threading.enumerate())
    updater = updater_of(layouts, gated, ledger, num_threads=2)
    assert set(threading.enumerate()) == before  # threads start with the first update
    updater.submit(1, 1e-2, 1.0)
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)
    asked.wait(10)
    threading.Timer(0.05, gate.set).start()
    updater.close()
    updater.close()
    assert not [t for t in set(threading.enumerate()) - before if t.name.startswith("horizon-update")]
    with pytest.raises(HorizonError, match="closed before every submitted update"):
        ledger.wait(2, 1)


def test_an_unused_updater_waits_for_nothing_and_closes():
    updater = updater_of([block(0)], Host([block(0)]), Ledger(1), num_threads=1)
    updater.wait()
    updater.close()
    with pytest.raises(RuntimeError, match="cannot submit step 1: the updater is closed"):
        updater.submit(1, 1e-2, 1.0)


def test_a_step_is_submitted_once_and_with_finite_numbers():
    layouts = [block(0)]
    host = Host(layouts)
    before = host.snapshot()
    updater = updater_of(layouts, host, Ledger(1), num_threads=1)
    with pytest.raises(NonFiniteError):
        updater.submit(1, 1e-2, float("nan"))
    updater.wait()
    for got, expected in zip(host.snapshot(), before, strict=True):
        np.testing.assert_array_equal(got, expected)
    updater.submit(1, 1e-2, 1.0)
    with pytest.raises(RuntimeError, match="cannot submit step 1 of block 0: it was given step 1"):
        updater.submit(1, 1e-2, 1.0)
    updater.wait()
    updater.close()
