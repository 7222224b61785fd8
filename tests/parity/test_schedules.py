"""How a step is executed never changes what it computes: memory, slots, threads, clipping path, accumulation."""

import time
from contextlib import contextmanager

import pytest
import torch

from horizon import MemoryConfig
from horizon.errors import HorizonError
from horizon.optim import updater
from tests.covering import pairwise
from tests.parity.reference import (
    Resident,
    assert_close_tensors,
    assert_same,
    assert_same_tensors,
    assert_trains_the_same,
    build,
    engine_for,
    outcome,
    padded,
    plain,
    prompted,
    streamed_step,
)

DEPTH = 4
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def deep(tied, **changes):
    return build("llama", num_hidden_layers=DEPTH, tie_word_embeddings=tied, **changes)


def steps():
    return [[padded(seed, [12, 7]), prompted(seed + 10, trained=3)] for seed in range(3)]


@pytest.fixture(scope="module")
def resident():
    """What the resident model does in three steps, tied and untied."""
    found = {}
    for tied in (False, True):
        model = Resident(deep(tied))
        found[tied] = [model.step(batches) for batches in steps()]
    return found


def check(resident, tied, **settings):
    with engine_for(deep(tied), **settings) as engine:
        for batches, expected in zip(steps(), resident[tied], strict=True):
            assert_same(streamed_step(engine, batches), expected)


# ---- memory, slots, threads


@pytest.mark.parametrize(("slots", "tied"), [(1, True), (2, False), (3, True), (DEPTH + 4, False), (1, False)])
def test_weight_slots(resident, slots, tied):
    check(resident, tied, memory=MemoryConfig(weight_slots=slots))


@pytest.mark.parametrize(("tied", "threads"), [(False, 1), (False, 3), (True, 3)])
def test_update_threads(resident, tied, threads, monkeypatch):
    monkeypatch.setattr(updater.Updater.__init__, "__defaults__", (512,))  # chunks: several to a parameter
    check(resident, tied, memory=MemoryConfig(update_threads=threads))


def undisturbed(tied, **settings):
    """Losses, norms and final weights of steps that follow each other at once: nobody waits for updates in between."""
    with engine_for(deep(tied), **settings) as engine:
        done = [engine.step(batches) for batches in steps()]
        return [(r.loss, r.grad_norm) for r in done], dict(engine.named_master_parameters())


@TIED
@pytest.mark.parametrize("clip", [0.5, None], ids=["kept", "ring"])
def test_a_slow_optimizer(tied, clip, monkeypatch):
    """Weights of a block are not loaded before its update is done, however long that takes."""
    expected, weights = undisturbed(tied, max_grad_norm=clip)
    update = updater.load_update()

    def slow(*arguments):
        time.sleep(0.004)
        update(*arguments)

    monkeypatch.setattr(updater, "load_update", lambda *_: slow)
    found, slow_weights = undisturbed(tied, max_grad_norm=clip)
    assert found == expected
    assert_same_tensors(slow_weights, weights)


@TIED
def test_steps_that_follow_each_other_at_once(resident, tied):
    found, weights = undisturbed(tied)
    assert found == [(step.loss, step.grad_norm) for step in resident[tied]]
    assert_same_tensors(weights, resident[tied][-1].weights)


@contextmanager
def offloading(tied, tokens, layers_on_device, **settings):
    """An engine whose device budget leaves room for the boundaries of some layers only."""
    with engine_for(deep(tied)) as engine:
        fixed = engine.plan.num_bytes("device")
    boundary = 4 * 32 * tokens  # fp32, hidden size 32
    budget = fixed + (3 + layers_on_device) * boundary  # 3: entering and leaving a block, and the gradient
    with engine_for(deep(tied), memory=MemoryConfig(device_budget=f"{budget}B"), **settings) as engine:
        yield engine
        assert f"boundaries of {layers_on_device} blocks" in [line.purpose for line in engine.plan.activations]
        assert engine.plan.num_bytes("device") <= budget


@pairwise(on_device=[0, 1, DEPTH - 1], tokens=[12, 60, 100], tied=[False, True])
def test_boundaries_on_the_host(on_device, tokens, tied):
    """Those of a block take the room of one gradient buffer, of several, of more than all."""
    batches = [[plain(seed, tokens=tokens), plain(seed + 10, rows=1, tokens=tokens)] for seed in range(2)]
    model = Resident(deep(tied))
    with offloading(tied, 3 * tokens, on_device) as engine:
        for step in batches:
            assert_same(streamed_step(engine, step), model.step(step))


@TIED
def test_boundaries_on_the_host_while_gradients_wait_there(tied):
    """The second backward may not borrow the buffers that hold the first one's gradients; the ring lends none."""
    batches = [plain(seed, rows=3, tokens=60) for seed in range(3)]
    accumulated, ringed = [], []
    for offload in (True, False):
        context = offloading(tied, 180, 1) if offload else engine_for(deep(tied))
        with context as engine:
            for batch in batches:
                engine.forward_backward(batch)
            accumulated.append(outcome(engine, engine.optimizer_step()))
        settings = {"max_grad_norm": None}
        context = offloading(tied, 180, 1, **settings) if offload else engine_for(deep(tied), **settings)
        with context as engine:
            losses = [engine.step(batch).loss for batch in batches]
            ringed.append((losses, dict(engine.named_master_parameters())))
    assert_same(*accumulated)
    assert ringed[0][0] == ringed[1][0]
    assert_same_tensors(ringed[0][1], ringed[1][1])


# ---- clipping


@TIED
def test_without_clipping_gradients_stream_and_nothing_changes(tied):
    streamed, kept = (undisturbed(tied, max_grad_norm=clip) for clip in (None, 1e9))
    assert streamed[0] == kept[0]
    assert_same_tensors(streamed[1], kept[1])
    with engine_for(deep(tied), max_grad_norm=None) as engine:
        engine.step(steps()[0])
        with pytest.raises(HorizonError, match="no gradients are kept"):
            dict(engine.named_gradients())


# ---- accumulation


@TIED
def test_the_two_halves_of_a_step_are_the_step(resident, tied):
    with engine_for(deep(tied)) as engine:
        for batches, expected in zip(steps(), resident[tied], strict=True):
            assert engine.forward_backward(batches) == expected.loss
            assert_same_tensors(dict(engine.named_gradients()), expected.gradients)
            assert_same(outcome(engine, engine.optimizer_step()), expected)


@TIED
def test_accumulated_backwards_are_one_step_with_their_micro_batches(tied):
    """Each call divides by the tokens so far and scales what waits, so the last bits differ."""
    batches = [padded(0, [12, 7]), prompted(1, trained=2), plain(2, rows=3, tokens=20)]
    expected = assert_trains_the_same(deep(tied), [batches])[0]
    with engine_for(deep(tied)) as engine:
        for batch in batches:
            engine.forward_backward(batch)
        result = engine.optimizer_step()
        assert result.num_tokens == 11 + 6 + 4 + 57
        assert_close_tensors(dict(engine.named_gradients()), expected.gradients, 2e-6)
        assert (result.loss, result.grad_norm) == pytest.approx((expected.loss, expected.grad_norm), rel=1e-6)


@TIED
def test_a_step_after_accumulation_starts_from_zero(resident, tied):
    with engine_for(deep(tied)) as engine:
        model = Resident(deep(tied))
        engine.forward_backward(plain(5))
        assert_same(outcome(engine, engine.optimizer_step()), model.step([plain(5)]))
        for batches in steps():
            assert_same(streamed_step(engine, batches), model.step(batches))
        engine.forward_backward(plain(6))
        assert_same(outcome(engine, engine.optimizer_step()), model.step([plain(6)]))


# ---- engines


def test_a_second_engine_in_the_same_process(resident):
    for _ in range(2):
        check(resident, tied=True)


def test_two_engines_side_by_side(resident):
    with engine_for(deep(False)) as one, engine_for(deep(True)) as two:
        for number, batches in enumerate(steps()):
            assert_same(streamed_step(one, batches), resident[False][number])
            assert_same(streamed_step(two, batches), resident[True][number])


def test_the_users_model_is_left_as_it_is():
    model = deep(False)
    before = {name: (p, p.detach().clone(), p.data_ptr()) for name, p in model.named_parameters()}
    with engine_for(model) as engine:
        engine.step(steps()[0])
    for name, p in model.named_parameters():
        original, value, pointer = before[name]
        assert p is original and p.data_ptr() == pointer and torch.equal(p, value) and p.grad is None
    assert model.training
