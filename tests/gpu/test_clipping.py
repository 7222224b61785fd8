"""Updates that begin inside the backward on CUDA: the exact ones where nothing is clipped, whatever dawdles."""

import threading

import numpy as np
import pytest
import torch

import horizon
from horizon.layout import ParamSpec, place_block
from horizon.optim.speculation import FLOOR, Speculation
from horizon.store.gradients import KeptGradients
from horizon.stream.gradients import GradientSlots
from horizon.stream.streams import Streams
from tests.gpu.models import DEVICE, EAGER, batches, build, differing, engine
from tests.gpu.test_waits import LARGE, slow_down

pytestmark = pytest.mark.gpu

LR = 1e-4


def train(model, steps=4, disturb=lambda step: None, **settings):
    """(results, masters by name) of steps over one batch; `disturb(step)` before each."""
    vocab = model["vocab_size"] if isinstance(model, dict) else 128
    with engine(model, optimizer=horizon.AdamW(lr=LR), compute_dtype="bfloat16", **settings) as streamed:
        results = []
        for step in range(steps):
            disturb(step)
            results.append(streamed.step(batches(2, rows=1, tokens=8, vocab=vocab)))
        return results, dict(streamed.named_master_parameters())


@pytest.mark.parametrize("family", ["llama", "llama, tied"])
def test_speculative_steps_that_are_not_clipped_are_the_exact_ones(family):
    model = build(family, **EAGER)
    exact, expected = train(model, max_grad_norm=1e9)
    found, masters = train(model, max_grad_norm=1e9, clip="speculative")
    assert [(r.loss, r.grad_norm) for r in found] == [(r.loss, r.grad_norm) for r in exact]
    assert differing(masters, expected) == []


@pytest.fixture
def patient(monkeypatch):
    """A block is updated before the next one lands, so that it is known how many there are to correct."""
    speculate = Speculation.speculate
    monkeypatch.setattr(
        Speculation, "speculate", lambda self, block: (speculate(self, block), self._updater.wait_idle())[0]
    )


def test_a_step_that_is_clipped_after_all_is_corrected(patient):
    """The limit lies below the norm of the fourth step alone: its loss counts three times."""

    def loss_fn(logits, batch):
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())
        return loss * (3.0 if loud[0] else 1.0)

    model, loud, step = build("llama", **EAGER), [False], batches()
    with engine(model, optimizer=horizon.AdamW(lr=LR), max_grad_norm=1e9, compute_dtype="bfloat16") as streamed:
        limit = 2.5 * streamed.step(step, loss_fn=loss_fn).grad_norm
    found = {}
    for clip in ("exact", "speculative"):
        loud[0] = False
        settings = {"max_grad_norm": limit, "compute_dtype": "bfloat16", "clip": clip}
        with engine(model, optimizer=horizon.AdamW(lr=LR), **settings) as streamed:
            for _ in range(3):
                assert streamed.step(step, loss_fn=loss_fn).clip_scale == 1
            before, loud[0] = dict(streamed.named_master_parameters()), True
            result = streamed.step(step, loss_fn=loss_fn)
            found[clip] = result, dict(streamed.named_master_parameters())
    (exact, expected), (speculative, masters) = found["exact"], found["speculative"]
    assert exact.clip_scale == speculative.clip_scale < 1
    assert speculative.corrected_blocks > 0
    for name, weight in expected.items():
        sizes = torch.stack([before[name].abs(), weight.abs(), torch.full_like(weight, FLOOR * LR)]).amax(0)
        ulp = torch.from_numpy(np.spacing(sizes.numpy()))
        assert float(((masters[name] - weight).abs() / ulp).max()) <= 4, name


@pytest.mark.parametrize("clip", ["speculative", "lagged"])
@pytest.mark.parametrize("role", ["compute", "fetch", "drain"])
def test_a_slow_stream_changes_no_bit(monkeypatch, role, clip):
    _, expected = train(LARGE, max_grad_norm=1e9)
    _, found = train(LARGE, max_grad_norm=1e9, clip=clip, disturb=lambda step: step or slow_down(monkeypatch, role))
    assert differing(found, expected) == []


@pytest.mark.parametrize("clip", ["speculative", "lagged"])
def test_a_landing_that_is_not_waited_for_shows(monkeypatch, clip):
    """So the test above can fail: a gradient is used before it is on the host."""
    _, expected = train(LARGE, max_grad_norm=1e9)
    synchronize = torch.cuda.Event.synchronize

    def forgetful(event):
        if threading.current_thread().name != "horizon-landings":
            synchronize(event)

    def disturb(step):
        if step == 2:
            slow_down(monkeypatch, "drain")
            monkeypatch.setattr(torch.cuda.Event, "synchronize", forgetful)

    _, found = train(LARGE, max_grad_norm=1e9, clip=clip, disturb=disturb)
    assert differing(found, expected)


def test_norms_land_with_the_gradient_and_the_launching_thread_waits_for_nothing():
    layouts = [place_block(0, "block", [ParamSpec("a", "a", (64, 64)), ParamSpec("b", "b", (64,))])]
    streams, landed = Streams.on(torch.device(DEVICE)), []

    class Sink:
        def landed(self, block, event, norms):
            landed.append((event, norms))

    buffers = KeptGradients(layouts, torch.bfloat16, pin=True)
    try:
        slots = GradientSlots(streams, layouts, buffers)
        gradient = torch.randn(64, 64, device=DEVICE, dtype=torch.bfloat16)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            slots.begin_step(0)
            slots.open(0, single=True)
            slots.add({"a": gradient, "b": None})
            slots.close(Sink())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        ((event, norms),) = landed
        event.synchronize()
        assert norms.device.type == "cpu" and norms.is_pinned()
        torch.testing.assert_close(norms, torch.stack([gradient.float().norm(), torch.zeros((), device=DEVICE)]).cpu())
        assert torch.equal(norms, slots.norms.cpu())
    finally:
        torch.cuda.synchronize()
        buffers.close()
