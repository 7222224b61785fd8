import threading
import time

import pytest

from horizon.store.ledger import Ledger


def in_thread(function, *args):
    """Start `function` and return (thread, list that receives its exception or 'done')."""
    outcome = []

    def body():
        try:
            function(*args)
            outcome.append("done")
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread, outcome


def test_versions_start_at_zero_and_are_kept_per_block():
    ledger = Ledger(3)
    ledger.publish(1, 4)
    assert [ledger.version(block) for block in range(3)] == [0, 4, 0]


def test_a_version_must_grow():
    ledger = Ledger(1)
    ledger.publish(0, 2)
    for version in (2, 1):
        with pytest.raises(RuntimeError, match=f"block 0 is at version 2 and cannot go to {version}"):
            ledger.publish(0, version)


def test_wait_returns_for_a_version_already_reached():
    ledger = Ledger(1)
    ledger.publish(0, 3)
    ledger.wait(0, 2)
    ledger.wait(0, 3)


def test_wait_blocks_until_this_block_reaches_this_version():
    ledger = Ledger(2)
    thread, outcome = in_thread(ledger.wait, 0, 2)
    ledger.publish(1, 2)
    ledger.publish(0, 1)
    thread.join(0.05)
    assert outcome == []
    ledger.publish(0, 2)
    thread.join(5)
    assert outcome == ["done"]


def test_waiting_burns_no_processor_time():
    ledger = Ledger(1)
    thread, _ = in_thread(ledger.wait, 0, 1)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05
    ledger.publish(0, 1)
    thread.join(5)


def test_the_first_failure_wakes_all_waiters_and_wins():
    ledger = Ledger(2)
    waiters = [in_thread(ledger.wait, block, 1) for block in (0, 1)]
    first = ValueError("first")
    ledger.fail(first)
    ledger.fail(ValueError("second"))
    for thread, outcome in waiters:
        thread.join(5)
        assert outcome == [first]
    with pytest.raises(ValueError, match="first"):
        ledger.raise_if_failed()


def test_listeners_hear_of_the_first_failure_once_even_when_they_come_late():
    ledger, heard = Ledger(1), []
    ledger.on_failure(heard.append)
    first = ValueError("first")
    ledger.fail(first)
    ledger.fail(ValueError("second"))
    assert heard == [first]
    ledger.on_failure(heard.append)
    assert heard == [first, first]


def test_wait_raises_a_failure_even_for_a_version_already_reached():
    ledger = Ledger(1)
    ledger.publish(0, 1)
    ledger.fail(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        ledger.wait(0, 1)


def test_no_failure_raises_nothing():
    Ledger(1).raise_if_failed()
    assert not Ledger(1).failed
