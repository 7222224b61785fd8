"""Steps that break while blocks are updated before the norm is known: taken back, or said to be lost."""

import signal
import threading
import time

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from horizon.errors import HorizonError, NonFiniteError
from horizon.optim.speculation import FLOOR, Speculation
from tests.failures.test_broken_steps import Mishap, every_call
from tests.failures.test_not_finite import InfiniteGradient

NUM_LAYERS = 3
FAR = {"clip": "speculative", "max_grad_norm": 1e9}  # nothing is clipped: from the second step on, blocks begin early
LR = 1e-5


def loss(logits, batch):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def quieter(logits, batch):
    return loss(logits, batch) / 3


@pytest.fixture
def build_calm(build, tools):
    """An engine after two steps, whose third will begin updates inside the backward."""

    def build_calm(**settings):
        engine = build(**{**FAR, **settings})
        for _ in range(2):
            engine.step(tools.make_batch(0), loss_fn=quieter)
        return engine

    return build_calm


def assert_as_before(engine, before):
    """Within 4 ulp, an ulp being that of the weight or of FLOOR learning rates."""
    found = dict(engine.named_master_parameters())
    for name, weight in before.items():
        sizes = torch.maximum(weight.abs(), torch.full_like(weight, FLOOR * LR))
        ulp = torch.from_numpy(np.spacing(sizes.numpy()))
        assert float(((found[name] - weight).abs() / ulp).max()) <= 4, name


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A block is updated before the next lands, so that it is known what a failure finds."""
    speculate = Speculation.speculate
    monkeypatch.setattr(
        Speculation, "speculate", lambda self, block: (speculate(self, block), self._updater.wait_idle())[0]
    )


def break_backward_of_layer_0(monkeypatch, error, landed=lambda: True):
    """The last recomputation raises, once `landed()`."""
    forward, calls = LlamaDecoderLayer.forward, iter(range(1, 1 << 30))

    def patched(*args, **kwargs):
        if next(calls) == 2 * NUM_LAYERS:
            while not landed():
                time.sleep(0.001)
            raise error
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", patched)


def num_begun(engine):
    """Blocks of the step under way whose update was begun before the norm is known."""
    return len(engine._runtime._steps._updates._speculation._blocks)


def count_undone(engine, monkeypatch):
    """The numbers of blocks that the speculation had begun when it was told to undo."""
    speculation, found = engine._runtime._steps._updates._speculation, []
    undo = speculation.undo
    monkeypatch.setattr(speculation, "undo", lambda: (found.append(len(speculation._blocks)), undo())[1])
    return found


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Mishap("once")], ids=["control-c", "mishap"])
def test_a_step_that_breaks_in_its_backward_is_taken_back(build_calm, fails, tools, monkeypatch, error):
    engine, twin = build_calm(), build_calm()
    before, undone = dict(engine.named_master_parameters()), count_undone(engine, monkeypatch)
    break_backward_of_layer_0(monkeypatch, error, lambda: num_begun(engine) == NUM_LAYERS)
    with fails(type(error), f"^{error}$"):
        engine.step(tools.make_batch(1))
    assert undone == [NUM_LAYERS]  # two layers and the head
    assert engine.num_steps == 2
    assert_as_before(engine, before)
    with fails(HorizonError, "no gradients are kept"):
        engine.named_gradients()
    again, expected = engine.step(tools.make_batch(1)), twin.step(tools.make_batch(1))
    assert again.loss == pytest.approx(expected.loss, rel=1e-6)
    assert_as_before(engine, dict(twin.named_master_parameters()))


def test_control_c_while_the_loss_is_computed_changes_nothing(build_calm, fails, tools):
    def interrupted(logits, batch):
        signal.raise_signal(signal.SIGINT)
        return logits.sum()

    engine, twin = build_calm(), build_calm()
    with fails(KeyboardInterrupt, "^$"):
        engine.step(tools.make_batch(1), loss_fn=interrupted)
    assert tools.equal(tools.train(engine)[1], tools.train(twin)[1])


def break_layer(monkeypatch, index):
    """Give the MLP of one layer an infinite gradient, the values being right; returns the switch."""
    forward, broken = LlamaMLP.forward, [False]

    def patched(module, x):
        output = forward(module, x)
        return InfiniteGradient.apply(output) if broken[0] and module.number == index else output

    monkeypatch.setattr(LlamaMLP, "forward", patched)
    return broken


@pytest.fixture
def numbered(tools):
    """A model whose MLPs know their layer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tools.LLAMA))
    for number, layer in enumerate(model.model.layers):
        layer.mlp.number = number
    return model


@pytest.mark.parametrize("on_nonfinite", ["skip", "stop"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_gradient_that_is_not_finite_takes_back_the_blocks_above(
    build, fails, tools, numbered, monkeypatch, on_nonfinite, layer
):
    broken = break_layer(monkeypatch, layer)
    engine, twin = (build(numbered, on_nonfinite=on_nonfinite, **FAR) for _ in range(2))
    for each in (engine, twin):
        tools.train(each)
    before, undone = dict(engine.named_master_parameters()), count_undone(engine, monkeypatch)
    broken[0] = True
    if on_nonfinite == "skip":
        result = engine.step(tools.make_batch(1))
        assert (result.skipped, result.clip_scale, result.corrected_blocks) == (True, 1.0, 0)
    else:
        with fails(NonFiniteError, rf"step 3: the gradient of model\.layers\.{layer}\..* is not finite"):
            engine.step(tools.make_batch(1))
    assert undone == [NUM_LAYERS - layer]  # the head and the layers above
    assert engine.num_steps == 2
    assert_as_before(engine, before)
    broken[0] = False
    again, expected = engine.step(tools.make_batch(1)), twin.step(tools.make_batch(1))
    assert not again.skipped and again.loss == pytest.approx(expected.loss, rel=1e-6)
    assert_as_before(engine, dict(twin.named_master_parameters()))


@pytest.mark.parametrize("on_nonfinite", ["skip", "stop"])
def test_a_loss_that_is_not_finite_begins_nothing(build_calm, fails, tools, on_nonfinite):
    engine = build_calm(on_nonfinite=on_nonfinite)
    before = dict(engine.named_master_parameters())

    def step():
        return engine.step(tools.make_batch(1), loss_fn=lambda logits, batch: logits.sum() * float("nan"))

    if on_nonfinite == "skip":
        assert step().skipped
    else:
        with fails(NonFiniteError, "step 3: the loss is nan, though every block's output is finite"):
            step()
    assert tools.equal(dict(engine.named_master_parameters()), before)


def break_pass(engine, monkeypatch, name, block):
    """From now on this pass over a chunk of `block` raises."""
    speculation, weights = engine._runtime._steps._updates._speculation, engine._runtime.store.weights[block]
    work, start, end = getattr(speculation, name), weights.data_ptr(), weights.data_ptr() + weights.nbytes

    def broken(hi, *others):
        if start <= hi.ctypes.data < end:
            raise Mishap("update")
        work(hi, *others)

    monkeypatch.setattr(speculation, name, broken)


@pytest.mark.parametrize("block, name", [(1, "layers.0"), (4, "head")])
def test_a_worker_that_raises_in_a_correction_is_heard_at_the_next_call(
    build_calm, build, fails, tools, monkeypatch, block, name
):
    norm = build(**FAR).step(tools.make_batch(0), loss_fn=loss).grad_norm
    engine = build_calm(max_grad_norm=0.99 * norm)
    break_pass(engine, monkeypatch, "_settle", block)
    assert engine.step(tools.make_batch(0), loss_fn=loss).corrected_blocks > 0  # the corrections run on behind
    for call in every_call(engine, tools.make_batch(2)):
        with fails(HorizonError, rf"the update of block {block} \({name}\) at step 3 failed: Mishap\('update'\)"):
            call()


@pytest.mark.parametrize("block, name", [(2, "layers.1"), (4, "head")])
def test_a_worker_that_raises_inside_the_backward_is_heard_in_the_same_step(
    build_calm, fails, tools, monkeypatch, block, name
):
    engine = build_calm()
    break_pass(engine, monkeypatch, "_speculate", block)
    message = rf"the update of block {block} \({name}\) at step 3 failed: Mishap\('update'\)"
    with fails(HorizonError, message):
        engine.step(tools.make_batch(0))
        engine.step(tools.make_batch(0))  # its threads may be late
    for call in every_call(engine, tools.make_batch(2)):
        with fails(HorizonError, message):
            call()


def test_what_cannot_be_taken_back_is_lost(build_calm, fails, tools, monkeypatch):
    engine = build_calm()
    break_backward_of_layer_0(monkeypatch, Mishap("backward"), lambda: num_begun(engine) == NUM_LAYERS)
    break_pass(engine, monkeypatch, "_restore", 4)
    with fails(Mishap, "backward"):
        engine.step(tools.make_batch(1))
    for call in every_call(engine, tools.make_batch(2)):
        with fails(HorizonError, r"the update of block 4 \(head\) at step 3 failed: Mishap\('update'\)"):
            call()


def test_closing_in_the_middle_of_corrections_ends_them(build_calm, build, tools, monkeypatch):
    norm = build(**FAR).step(tools.make_batch(0), loss_fn=loss).grad_norm
    engine = build_calm(max_grad_norm=0.99 * norm)
    speculation = engine._runtime._steps._updates._speculation
    reached, go_on, settle = threading.Event(), threading.Event(), speculation._settle

    def slow(*arguments):
        reached.set()
        assert go_on.wait(30)
        settle(*arguments)

    monkeypatch.setattr(speculation, "_settle", slow)
    engine.step(tools.make_batch(0), loss_fn=loss)
    assert reached.wait(30)
    closing = threading.Thread(target=engine.close)
    closing.start()
    go_on.set()
    closing.join(30)
    assert not closing.is_alive()


# ---- lagged


def test_a_lagged_step_that_breaks_before_its_first_update_is_forgotten(build, fails, tools, monkeypatch):
    engine, twin = build(clip="lagged"), build(clip="lagged")
    break_backward_of_layer_0(monkeypatch, Mishap("measuring"))  # the first step goes through the model twice
    with fails(Mishap, "measuring"):
        engine.step(tools.make_batch(0))
    assert tools.equal(tools.train(engine)[1], tools.train(twin)[1])


def test_a_lagged_step_that_breaks_after_its_first_update_ends_the_run(build, fails, tools, monkeypatch):
    engine = build(clip="lagged")
    engine.step(tools.make_batch(0))
    break_backward_of_layer_0(monkeypatch, Mishap("once"), lambda: engine._runtime._steps._updates._num_updates)
    with fails(Mishap, "once"):
        engine.step(tools.make_batch(1))
    message = r"step 2 failed when \d of 5 blocks had been updated \(Mishap\('once'\)\).*optim\.clip=exact"
    for call in every_call(engine, tools.make_batch(2)):
        with fails(HorizonError, message):
            call()


def test_the_first_lagged_step_is_not_begun_if_its_gradients_are_not_finite(build, fails, tools, numbered, monkeypatch):
    broken = break_layer(monkeypatch, 1)
    engine, twin = (build(numbered, clip="lagged") for _ in range(2))
    broken[0] = True
    with fails(
        NonFiniteError,
        r"step 1: the gradient of model\.layers\.1\..* is not finite .*; set on_nonfinite=skip and clip=exact",
    ):
        engine.step(tools.make_batch(0))
    broken[0] = False
    assert tools.equal(tools.train(engine)[1], tools.train(twin)[1])


def test_a_later_lagged_step_whose_gradients_are_not_finite_ends_the_run(build, fails, tools, numbered, monkeypatch):
    broken = break_layer(monkeypatch, 1)
    engine = build(numbered, clip="lagged")
    engine.step(tools.make_batch(0))
    broken[0] = True
    message = r"step 2: the gradient of model\.layers\.1\..* blocks were updated before that was known.*clip=exact"
    for call in (lambda: engine.step(tools.make_batch(0)), lambda: engine.evaluate(tools.make_batch(0))):
        with fails(NonFiniteError, message):
            call()
