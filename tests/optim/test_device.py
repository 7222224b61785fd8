import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon.errors import HorizonError, NonFiniteError
from horizon.layout import PARAM_ALIGN, ParamSpec, place_block
from horizon.optim import device
from horizon.optim.adamw import AdamW
from horizon.optim.device import DeviceUpdater, StateTensors, TieredUpdater, can_update, chunk_table, make_updater
from horizon.optim.updater import Updater
from horizon.store.ledger import Ledger
from horizon.store.split import split_master
from horizon.stream.streams import Streams

CPU = torch.device("cpu")
ADAMW = AdamW(lr=1e-2, weight_decay=0.1)
SHAPES = [(37, 5), (64,), (128, 3), (7,), (64, 64), (1,)]


def block(index, shapes=SHAPES, trainable=True):
    """A layout whose vectors do not decay and whose other parameters do; one more parameter is frozen."""
    specs = [ParamSpec(f"b{index}.p{i}", f"p{i}", s, trainable, decay=len(s) > 1) for i, s in enumerate(shapes)]
    return place_block(index, f"block.{index}", [*specs, ParamSpec(f"b{index}.f", "f", (70,), False)])


LAYOUTS = [block(0), block(1, trainable=False), block(2), block(3, [(300, 30)])]


class States:
    """The tensors of some blocks, random but for padding; which were asked for and released."""

    def __init__(self, layouts, grad_dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        self.tensors, self.released = {}, []
        for layout in layouts:
            weights, grads = torch.zeros(layout.num_elements), torch.zeros(layout.num_trainable)
            for param in layout.params:
                span = slice(param.offset, param.end)
                weights[span] = 0.02 * torch.randn(param.spec.numel, generator=generator)
                if param.spec.trainable:
                    grads[span] = torch.randn(param.spec.numel, generator=generator)
            moments = torch.zeros(2, layout.num_trainable)
            tensors = (*split_master(weights), moments[0], moments[1], grads.to(grad_dtype))
            self.tensors[layout.index] = StateTensors(*tensors)

    def __call__(self, index):
        return self.tensors[index]

    def by_name(self, index):
        return self.tensors[index]._asdict()

    def bits(self):
        return {
            (index, name): tensor.view(torch.int16).clone()
            for index, tensors in self.tensors.items()
            for name, tensor in zip(StateTensors._fields, tensors, strict=True)
        }


def trained(in_hbm, grad_dtype=torch.bfloat16, by_block=False, steps=3):
    """States after some steps, updated on the tiers where `in_hbm` puts their blocks."""
    states, ledger = States(LAYOUTS, grad_dtype), Ledger(len(LAYOUTS))
    updater = make_updater(
        LAYOUTS, in_hbm, states.by_name, ledger, ADAMW, 2, Streams.on(CPU), lambda block: states.released.append(block)
    )
    for step in range(1, steps + 1):
        if by_block:
            for index in (3, 2, 0):
                updater.submit_block(index, step, ADAMW.lr / step)
        else:
            updater.submit(step, ADAMW.lr / step, 0.5)
        for layout in LAYOUTS:
            ledger.wait(layout.index, step)
    updater.close()
    assert [ledger.version(layout.index) for layout in LAYOUTS] == [steps] * len(LAYOUTS)
    assert sorted(states.released) == sorted([0, 2, 3] * steps)
    return states.bits()


@pytest.mark.parametrize("by_block", [False, True], ids=["all at once", "block by block"])
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("in_hbm", [{0}, {0, 1}, {2, 3}, {0, 1, 2, 3}], ids=str)
def test_an_update_has_the_same_bits_on_either_tier(in_hbm, grad_dtype, by_block):
    expected = trained(set(), grad_dtype, by_block)
    found = trained(in_hbm, grad_dtype, by_block)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    before = States(LAYOUTS, grad_dtype).bits()
    assert not torch.equal(found[0, "weights"], before[0, "weights"])
    assert torch.equal(found[1, "weights"], before[1, "weights"])  # nothing of it is trained


def test_blocks_on_the_host_only_need_no_second_updater():
    made = make_updater(
        LAYOUTS, set(), States(LAYOUTS).by_name, Ledger(4), ADAMW, 1, Streams.on(CPU), lambda block: None
    )
    assert isinstance(made, Updater)


def on_device(states, ledger, layouts=LAYOUTS):
    return DeviceUpdater(layouts, states, ledger, ADAMW, Streams.on(CPU), states.released.append)


def test_a_version_is_published_once_its_update_is_launched_and_its_buffer_released():
    states, ledger = States(LAYOUTS), Ledger(4)
    updater, seen = on_device(states, ledger), []
    launch = updater._update
    updater._update = lambda block, *rest: (seen.append((block, ledger.version(block))), launch(block, *rest))
    updater.submit(1, 1e-2, 1.0)
    assert seen == [(0, 0), (2, 0), (3, 0)]
    assert [ledger.version(b) for b in range(4)] == [1, 1, 1, 1]
    updater.submit_block(2, 2, 1e-2)
    assert [ledger.version(b) for b in range(4)] == [1, 2, 2, 1]  # with the first block, those with nothing to train
    assert states.released == [0, 2, 3, 2]


def test_an_update_that_fails_is_what_everybody_hears_of():
    states, ledger = States(LAYOUTS), Ledger(4)
    updater = on_device(states, ledger)

    def broken(block, *rest):
        if block == 2:
            raise ValueError("no such kernel")

    updater._update = broken
    message = r"the update of block 2 \(block.2\) at step 1 failed: ValueError\('no such kernel'\)"
    with pytest.raises(HorizonError, match=message):
        updater.submit(1, 1e-2, 1.0)
    with pytest.raises(HorizonError, match=message):
        ledger.wait(3, 1)
    with pytest.raises(HorizonError, match=message):
        updater.submit_block(3, 1, 1e-2)


@pytest.mark.parametrize(("lr", "scale"), [(float("nan"), 1.0), (1e-2, float("inf"))])
def test_scalars_that_are_not_finite_touch_nothing(lr, scale):
    states, ledger = States(LAYOUTS), Ledger(4)
    host = Updater([], lambda block: None, ledger, ADAMW, 1, lambda block: None)
    before = states.bits()
    with pytest.raises(NonFiniteError):
        TieredUpdater(host, on_device(states, ledger)).submit(1, lr, scale)
    assert all(torch.equal(states.bits()[key], value) for key, value in before.items())
    assert ledger.version(0) == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=9), st.integers(1, 6))
def test_the_rows_of_a_table_cover_every_trained_element_once_and_no_other_parameter(params, chunk_aligns):
    specs = [ParamSpec(f"p{i}", f"p{i}", (n,), True, decay) for i, (n, decay) in enumerate(params)]
    layout = place_block(0, "b", [*specs, ParamSpec("f", "f", (64,), False)])
    covered, decays = np.zeros(layout.num_elements, int), np.zeros(layout.num_elements, bool)
    for start, stop, decay in chunk_table(layout, chunk_aligns * PARAM_ALIGN).tolist():
        assert start % PARAM_ALIGN == stop % PARAM_ALIGN == 0 and stop - start <= chunk_aligns * PARAM_ALIGN
        covered[start:stop] += 1
        decays[start:stop] = decay
    for param in layout.params:
        assert (covered[param.offset : param.end] == param.spec.trainable).all()
        if param.spec.trainable:
            assert (decays[param.offset : param.end] == param.spec.decay).all()
    assert covered.max() == 1 and not covered[layout.num_trainable :].any()


def test_a_gpu_without_triton_cannot_update(monkeypatch):
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert can_update(CPU) and not can_update(torch.device("cuda", 0))


def test_the_block_by_block_updates_of_two_tiers_go_to_different_threads():
    """The host's are queued for its threads; the device's are over when the call returns."""
    states, ledger = States(LAYOUTS), Ledger(4)
    threads = {}
    updater = make_updater(
        LAYOUTS, {0}, states.by_name, ledger, ADAMW, 1, Streams.on(CPU), lambda b: threads.update({b: me()})
    )
    updater.submit_block(0, 1, 1e-2)
    assert ledger.version(0) == 1
    updater.submit_block(2, 1, 1e-2)
    ledger.wait(2, 1)
    updater.close()
    assert threads[0] == me() != threads[2]


def me():
    return threading.current_thread().name
