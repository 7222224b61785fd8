"""Each way to clip: what is updated when, with which scale, and what is left when a step is dropped."""

import threading

import pytest
import torch

from horizon.errors import HorizonError
from horizon.optim.apply import DroppedGradients, KeptUpdates, SpeculativeUpdates, StreamedUpdates
from horizon.optim.landings import Landings
from horizon.store.ledger import Ledger
from horizon.stream.streams import DoneEvent

DONE = DoneEvent()
LOSS = torch.tensor(1.0)
QUIET, LOUD = torch.tensor(0.5), torch.tensor(2.0)  # norms below and above the limit of 1


def norms(value):
    return torch.tensor([value, 0.0])


class FakeUpdater:
    """Notes what it is asked for; a block's chunks are never looked at."""

    def __init__(self):
        self.chunks, self.calls = {0: (), 1: (), 2: ()}, []
        self.num_blocks = len(self.chunks)

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, *args))


class FakeSpeculation:
    def __init__(self):
        self.calls, self.corrected = [], 0

    def __getattr__(self, name):
        return lambda *args: (self.calls.append((name, *args)), self.corrected)[1]


@pytest.fixture
def make():
    """`make()`: speculative updates, and what they ask of the speculation."""

    def make(weight_decay=0.01):
        updates = SpeculativeUpdates(FakeUpdater(), Ledger(3), 1.0, weight_decay)
        updates._speculation = FakeSpeculation()
        return updates, updates._speculation

    return make


def send(updates, landings, loss=LOSS):
    """One step's turn and landings, in order."""
    updates.turned(loss, DONE)
    for block, norm in landings:
        updates.landed(block, DONE, norms(norm))
    updates.finish()


def speculated(speculation):
    return [args[0] for name, *args in speculation.calls if name == "speculate"]


def test_blocks_are_begun_as_they_land(make):
    updates, speculation = make()
    updates.begin(3, 1e-2, QUIET)
    send(updates, [(2, 0.5), (1, 0.5), (0, 0.5)])
    assert speculation.calls == [("begin", 3, 1e-2), ("speculate", 2), ("speculate", 1), ("speculate", 0)]
    assert updates.settle(torch.tensor(0.87)) == (1.0, 0)
    assert speculation.calls[-1] == ("settle", 1.0)


@pytest.mark.parametrize("last", [None, LOUD, torch.tensor(1.0)], ids=["first", "clipped", "just clipped"])
def test_after_a_step_that_was_clipped_or_none_everything_waits(make, last):
    """A norm of 1 is scaled by 1 / (1 + 1e-6)."""
    updates, speculation = make()
    updates.begin(1, 1e-2, last)
    send(updates, [(2, 0.1), (1, 0.1)])
    assert speculated(speculation) == []
    updates.settle(QUIET)
    updates.begin(2, 1e-2, QUIET)
    send(updates, [(2, 0.1)])
    assert speculated(speculation) == [2]


def test_no_block_is_begun_once_the_gradients_so_far_are_too_large(make):
    updates, speculation = make()
    updates.begin(3, 1e-2, QUIET)
    send(updates, [(2, 0.9), (1, 0.5), (0, 0.0)])  # 0.9^2 + 0.5^2 > 1
    assert speculated(speculation) == [2]
    assert speculation.calls[-1] == ("stop",)
    speculation.corrected = 1
    assert updates.settle(LOUD) == (pytest.approx(0.5), 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_block_is_begun_from_one_whose_gradient_is_not_finite_on(make, bad):
    updates, speculation = make()
    updates.begin(3, 1e-2, QUIET)
    send(updates, [(2, 0.1), (1, bad), (0, 0.1)])
    assert speculated(speculation) == [2]
    assert updates.drop() == 0
    assert speculation.calls[-1] == ("undo",)


@pytest.mark.parametrize("loss", [float("nan"), None], ids=["not finite", "forward failed"])
def test_nothing_is_begun_unless_the_loss_is_finite(make, loss):
    updates, speculation = make()
    updates.begin(3, 1e-2, QUIET)
    if loss is not None:
        updates.turned(torch.tensor(loss), DONE)
    updates.landed(2, DONE, norms(0.1))
    updates.finish()
    assert speculated(speculation) == []


def test_a_decay_that_leaves_little_of_a_weight_is_not_tried(make):
    updates, speculation = make(weight_decay=1.0)
    for lr, begun in ((0.6, []), (0.5, [2])):
        updates.begin(3, lr, QUIET)
        send(updates, [(2, 0.1)])
        assert speculated(speculation) == begun


def test_landings_that_come_before_a_step_is_dropped_are_not_begun(make):
    updates, speculation = make()
    go_on = threading.Event()

    class Late:
        def synchronize(self):
            assert go_on.wait(30)

    updates.begin(3, 1e-2, QUIET)
    updates.turned(LOSS, DONE)
    updates.landed(2, Late(), norms(0.1))
    threading.Timer(0.05, go_on.set).start()
    updates.drop()
    assert speculated(speculation) == []


def test_kept_updates_apply_the_norms_scale_when_it_is_known():
    updater = FakeUpdater()
    updates = KeptUpdates(updater, 1.0, expect=lambda: updater.calls.append("expect"))
    updates.begin(4, 1e-2, QUIET)
    send(updates, [(2, 3.0), (1, 3.0)])
    assert updater.calls == [] and updates.drop() == 0
    scale, corrected = updates.settle(LOUD)
    assert (scale, corrected) == (pytest.approx(0.5), 0)
    assert updater.calls == ["expect", ("submit", 4, 1e-2, scale)]  # gradients on disk are asked for first
    assert updates.drop() == 3  # they are under way


@pytest.mark.parametrize("last, max_norm, scale", [(None, None, 1.0), (QUIET, 1.0, 1.0), (LOUD, 1.0, 0.5)])
def test_streamed_updates_use_the_norm_of_the_step_before(last, max_norm, scale):
    updater, released = FakeUpdater(), []
    updates = StreamedUpdates(updater, Ledger(3), released.append, max_norm)
    updates.begin(4, 1e-2, last)
    send(updates, [(2, 3.0), (1, 3.0)])
    assert updater.calls == [("submit_block", b, 4, 1e-2, pytest.approx(scale)) for b in (2, 1)]
    assert updates.settle(torch.tensor(4.2)) == (pytest.approx(scale), 0)
    assert (updates.drop(), released) == (2, [])
    updates.begin(5, 1e-2, last)
    send(updates, [(2, 3.0), (1, 3.0)], torch.tensor(float("nan")))
    assert (updates.drop(), released) == (0, [2, 1])


def test_lagged_updates_do_not_begin_without_a_norm():
    with pytest.raises(RuntimeError, match="norm of a step before"):
        StreamedUpdates(FakeUpdater(), Ledger(3), lambda block: None, 1.0).begin(1, 1e-2, None)


def test_a_dropped_gradient_gives_its_buffer_back():
    released = []
    sink = DroppedGradients(released.append)
    sink.turned(LOSS, DONE)
    sink.landed(2, DONE, norms(1.0))
    assert released == [2]


def test_a_landing_that_fails_is_recorded_and_ends_the_thread():
    ledger = Ledger(3)

    def take(block, norms):
        raise OSError("gone")

    landings = Landings(ledger, take, lambda block: None)
    landings.begin(7)
    send(landings, [(2, 0.1), (1, 0.1)])
    with pytest.raises(HorizonError, match=r"the gradient of block 2 at step 7 did not land: OSError\('gone'\)"):
        ledger.raise_if_failed()
    assert not [thread for thread in threading.enumerate() if thread.name == "horizon-landings"]
