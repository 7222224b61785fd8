"""Steps that break half-way: the first error wins, nobody hangs, and the engine goes on unless its weights are lost."""

import signal
import threading

import pytest
import torch
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from horizon import MemoryConfig
from horizon.errors import HorizonError
from horizon.optim.kernel import update_numba

NUM_LAYERS = 3
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 64,
        "resid_pdrop": 0.2, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


class Mishap(Exception):
    """What model code may raise."""


@pytest.fixture
def fail_once(monkeypatch):
    """`fail_once(layer class, n, error)`: the n-th call of a layer from now on raises, the others are as ever."""

    def fail_once(layer, call, error):
        forward, calls = layer.forward, iter(range(1, 1 << 30))

        def patched(*args, **kwargs):
            if next(calls) == call:
                raise error
            return forward(*args, **kwargs)

        monkeypatch.setattr(layer, "forward", patched)

    return fail_once


@pytest.mark.parametrize(
    ("call", "error"),  # calls from 1 to 3 are the forward's, the others recomputations in the backward
    [(1, Mishap("a")), (2, KeyboardInterrupt()), (3, Mishap("b")), (5, KeyboardInterrupt()), (6, Mishap("c"))],
    ids=repr,
)
@pytest.mark.parametrize("weight_slots", [1, 2, 5])
def test_after_a_failure_inside_the_model_the_engine_trains_as_if_nothing_had_been(
    build, fails, tools, healthy, fail_once, call, error, weight_slots
):
    engine = build(memory=MemoryConfig(weight_slots=weight_slots))
    first = engine.step(tools.make_batch(0))
    fail_once(LlamaDecoderLayer, call, error)
    with fails(type(error), f"^{error}$"):
        engine.step(tools.make_batch(1))
    with fails(HorizonError, "no gradients are kept"):
        engine.named_gradients()
    losses = [first.loss, engine.step(tools.make_batch(1)).loss]
    assert losses == healthy[0]
    assert tools.equal(dict(engine.named_master_parameters()), healthy[1])


@pytest.mark.parametrize("call", [2, 5])
def test_a_repeated_step_draws_the_same_dropout_masks(build, fails, tools, fail_once, call):
    engine, twin = build(GPT2), build(GPT2)
    expected = tools.train(twin)
    fail_once(GPT2Block, call, Mishap("once"))
    with fails(Mishap, "once"):
        engine.step(tools.make_batch(0))
    losses, masters = tools.train(engine)
    assert losses == expected[0]
    assert tools.equal(masters, expected[1])


@pytest.mark.parametrize("call", [1, 3])
def test_without_clipping_a_failure_before_the_first_update_is_forgotten(build, fails, tools, fail_once, call):
    engine, twin = build(max_grad_norm=None), build(max_grad_norm=None)
    twin.step(tools.make_batch(0)), twin.step(tools.make_batch(1))
    engine.step(tools.make_batch(0))
    fail_once(LlamaDecoderLayer, call, Mishap("once"))
    with fails(Mishap, "once"):
        engine.step(tools.make_batch(1))
    engine.step(tools.make_batch(1))
    assert tools.equal(dict(engine.named_master_parameters()), dict(twin.named_master_parameters()))


def test_without_clipping_a_failure_after_the_first_update_ends_the_run(build, fails, tools, fail_once):
    """Some blocks have seen the step and others have not: no later call may use such weights."""
    engine = build(max_grad_norm=None)
    engine.step(tools.make_batch(0))
    fail_once(LlamaDecoderLayer, 2 * NUM_LAYERS - 1, Mishap("once"))
    with fails(Mishap, "once"):
        engine.step(tools.make_batch(1))
    for call in (
        lambda: engine.step(tools.make_batch(1)),
        lambda: engine.evaluate(tools.make_batch(1)),
        lambda: engine.named_master_parameters(),
        lambda: engine.save_pretrained("never"),
    ):
        with fails(HorizonError, r"step 2 failed when \d of 5 blocks had been updated \(Mishap\('once'\)\)"):
            call()


def test_a_failed_step_keeps_no_place_in_the_ring_of_gradients(build, fails, tools, fail_once):
    """The head claims the tied embedding's buffer; were it lost, the fourth step would find no free one."""
    settings = {"max_grad_norm": None, "freeze": ["model.norm.weight"]}  # so that the head has no update of its own
    tied = {**tools.LLAMA, "tie_word_embeddings": True}
    engine, twin = build(tied, **settings), build(tied, **settings)
    for _ in range(5):
        fail_once(LlamaDecoderLayer, NUM_LAYERS + 1, Mishap("backward"))
        with fails(Mishap, "backward"):
            engine.step(tools.make_batch(0))
    assert tools.equal(tools.train(engine)[1], tools.train(twin)[1])


def test_control_c_stops_the_step_at_once_and_the_engine_goes_on(build, fails, tools, healthy):
    def interrupted(logits, batch):
        signal.raise_signal(signal.SIGINT)
        return logits.sum()

    engine = build()
    for call in (engine.step, engine.forward_backward, engine.evaluate):
        with fails(KeyboardInterrupt, "^$"):
            call(tools.make_batch(0), loss_fn=interrupted)
    assert tools.equal(tools.train(engine)[1], healthy[1])


def test_a_failed_accumulation_takes_the_waiting_gradients_along(build, fails, tools, healthy, fail_once):
    engine = build()
    engine.forward_backward(tools.make_batch(5))
    fail_once(LlamaDecoderLayer, 5, Mishap("once"))
    with fails(Mishap, "once"):
        engine.forward_backward(tools.make_batch(6))
    with fails(HorizonError, "optimizer_step without gradients"):
        engine.optimizer_step()
    assert tools.equal(tools.train(engine)[1], healthy[1])


@pytest.fixture
def fail_update(monkeypatch):
    """`fail_update(engine, block)`: from its next update on, the worker that comes to `block` raises."""

    def fail_update(engine, block):
        engine._runtime.wait_for_updates()  # those under way are not the next
        states = engine._runtime.store.weights[block]
        start, end = states.data_ptr(), states.data_ptr() + states.nbytes

        def update(weights, *others):
            if start <= weights.ctypes.data < end:
                raise Mishap("update")
            update_numba(weights, *others)

        monkeypatch.setattr(engine._runtime._updater, "_update", update)

    return fail_update


def every_call(engine, batch):
    return (
        lambda: engine.step(batch),
        lambda: engine.forward_backward(batch),
        lambda: engine.optimizer_step(),
        lambda: engine.evaluate(batch),
        lambda: engine.next_token_logits(batch),
        lambda: engine.named_master_parameters(),
        lambda: engine.named_gradients(),
        lambda: engine.save_pretrained("never"),
        lambda: engine.plan_micro_batch(2, 16),
    )


@pytest.mark.parametrize("block, name", [(0, "embed"), (2, "layers.1"), (4, "head")])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_worker_that_raises_is_heard_at_the_next_call(build, fails, tools, fail_update, block, name, threads):
    engine = build(memory=MemoryConfig(update_threads=threads))
    engine.step(tools.make_batch(0))
    engine.evaluate(tools.make_batch(0))  # the first step's updates are done
    fail_update(engine, block)
    engine.step(tools.make_batch(1))  # its updates run on behind
    for call in every_call(engine, tools.make_batch(2)):
        with fails(HorizonError, rf"the update of block {block} \({name}\) at step 2 failed: Mishap\('update'\)"):
            call()


@pytest.mark.parametrize("block, name", [(0, "embed"), (5, "layers.4"), (9, "head")])
def test_a_worker_that_raises_without_clipping_wakes_a_backward_that_waits_for_a_buffer(
    build, fails, tools, fail_update, block, name
):
    engine = build({**tools.LLAMA, "num_hidden_layers": 8}, max_grad_norm=None)
    engine.step(tools.make_batch(0))
    fail_update(engine, block)
    message = rf"the update of block {block} \({name}\) at step 2 failed"
    with fails(HorizonError, message):
        for seed in range(2):  # the updates of the last blocks may end after their step
            engine.step(tools.make_batch(seed))
    for call in every_call(engine, tools.make_batch(2)):
        with fails(HorizonError, message):
            call()


def test_an_event_that_raises_without_clipping_is_heard_in_the_same_step(build, fails, tools, monkeypatch):
    """As a CUDA error does, which surfaces where the host waits."""

    class BadEvent:
        def synchronize(self):
            raise RuntimeError("device lost")

    engine = build(max_grad_norm=None)
    updates = engine._runtime._steps._updates
    landed = updates.landed
    monkeypatch.setattr(
        updates, "landed", lambda block, event, norms: landed(block, BadEvent() if block == 3 else event, norms)
    )
    message = r"the gradient of block 3 at step 1 did not land: RuntimeError\('device lost'\)"
    for _ in range(2):
        with fails(HorizonError, message):
            engine.step(tools.make_batch(0))


def test_closing_in_the_middle_of_updates_ends_them(build, tools, monkeypatch):
    engine = build()
    reached, go_on = threading.Event(), threading.Event()

    def slow(weights, *others):
        reached.set()
        assert go_on.wait(30)
        update_numba(weights, *others)

    engine.step(tools.make_batch(0))
    engine.evaluate(tools.make_batch(0))
    monkeypatch.setattr(engine._runtime._updater, "_update", slow)
    engine.step(tools.make_batch(1))
    assert reached.wait(30)
    closing = threading.Thread(target=engine.close)
    closing.start()
    go_on.set()
    closing.join(30)
    assert not closing.is_alive()


def test_the_error_of_the_body_is_not_lost_when_closing_fails(build, fails, tools, monkeypatch):
    engine = build()
    close = engine._runtime.close

    def failing():
        close()
        raise RuntimeError("closing")

    monkeypatch.setattr(engine._runtime, "close", failing)
    with fails(Mishap, "body"), engine:
        raise Mishap("body")
    with fails(HorizonError, "the engine is closed"):
        engine.step(tools.make_batch(0))


def test_losing_one_part_on_closing_still_releases_the_others(build, fails, tools, monkeypatch):
    engine = build()
    engine.step(tools.make_batch(0))
    close = engine._runtime.buffers.close

    def failing():
        close()
        raise RuntimeError("one part")

    monkeypatch.setattr(engine._runtime.buffers, "close", failing)
    with fails(RuntimeError, "one part"):
        engine.close()  # that all arenas and threads are gone is checked after every test


def test_torch_memory_errors_of_the_device_become_budget_errors(build, fails, tools, healthy, fail_once):
    from horizon.errors import BudgetError

    engine = build()
    fail_once(LlamaDecoderLayer, 2, torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"))
    with fails(BudgetError, r"ran out of memory \(CUDA out of memory.*2 GiB.\); use a smaller train.micro_batch"):
        engine.step(tools.make_batch(0))
    assert tools.equal(tools.train(engine)[1], healthy[1])
