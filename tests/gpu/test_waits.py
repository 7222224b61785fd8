"""Races made likely: weights so large and rows so few that copies take longer than kernels, and streams that dawdle.

Sleeping on one stream must not change a bit. Then one wait is left out while its counterpart sleeps, and the
result must differ, which shows that the first test can fail. Between two runs of a batch another batch goes through,
so that nothing stale is right by accident.
"""

import sys

import pytest
import torch

from horizon.models.blocks import BlockModel
from horizon.stream.streams import Streams
from tests.gpu.models import DEVICE, EAGER, batches, differing, engine, gradients

pytestmark = pytest.mark.gpu

CYCLES = 40_000_000  # about twenty milliseconds, longer than it takes to launch the kernels of two blocks
VOCAB = 512
LARGE = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True, **EAGER,
}  # fmt: skip


@pytest.fixture(scope="module")
def streamed():
    with engine(LARGE, compute_dtype="bfloat16") as engine_:
        engine_.plan_micro_batch(1, 8)  # measures: not to be disturbed
        yield engine_


@pytest.fixture(scope="module")
def expected(streamed):
    """Gradients of an undisturbed pass that keeps the layers' graphs on the device."""
    return run(streamed)


def run(streamed, disturb=lambda: None):
    """Gradients of a fixed batch, after another one has gone through."""
    gradients(streamed, step(seed=1))
    disturb()
    return gradients(streamed, step(seed=0))


def step(seed):
    return batches(2, rows=1, tokens=8, vocab=VOCAB, seed=seed)


def slow_down(monkeypatch, role):
    """Let a stream sleep before each of its copies, or compute before each layer."""
    copy, layer = Streams.copy, BlockModel._run_layer

    def slow_copy(self, stream, target, source):
        if stream is getattr(self, role):
            with self.running(stream):
                torch.cuda._sleep(CYCLES)
        copy(self, stream, target, source)

    def slow_layer(self, *args):
        torch.cuda._sleep(CYCLES)
        return layer(self, *args)

    if role == "compute":
        monkeypatch.setattr(BlockModel, "_run_layer", slow_layer)
    else:
        monkeypatch.setattr(Streams, "copy", slow_copy)


def forget_wait(monkeypatch, function):
    """Ignore the waits of one function of the stream package."""
    wait_event = torch.cuda.Stream.wait_event

    def forgetful(self, event):
        if sys._getframe(1).f_code.co_name != function:
            wait_event(self, event)

    monkeypatch.setattr(torch.cuda.Stream, "wait_event", forgetful)


def test_a_pass_repeats_bit_for_bit(streamed, expected):
    assert differing(run(streamed), expected) == []


@pytest.mark.parametrize("offloaded", [False, True], ids=["graphs kept", "offloaded"])
@pytest.mark.parametrize("role", ["compute", "fetch", "drain"])
def test_a_slow_stream_changes_no_bit(streamed, expected, offload_everything, monkeypatch, role, offloaded):
    if offloaded:
        offload_everything()
    found = run(streamed, lambda: slow_down(monkeypatch, role))
    assert differing(found, expected) == []


@pytest.mark.parametrize(
    ("function", "slow"),
    [
        ("acquire", "fetch"),  # compute reads a slot before its weights have landed
        ("_load", "compute"),  # weights land in a slot that is still being read
        ("_free_slot", "drain"),  # gradients are written over others that have yet to leave
        ("_drain", "compute"),  # gradients leave before they are computed
        ("_add_partial", "fetch"),  # the head's share of a tied gradient is added before it is there
        ("save", "compute"),  # a boundary leaves before it is computed
        ("read", "drain"),  # a boundary's memory is used again before it has left
        ("take", "fetch"),  # a boundary is read before it is back
    ],
)
def test_without_a_wait_the_result_differs(streamed, expected, offload_everything, monkeypatch, function, slow):
    offload_everything()

    def disturb():
        slow_down(monkeypatch, slow)
        forget_wait(monkeypatch, function)

    found = run(streamed, disturb)
    monkeypatch.undo()
    torch.cuda.synchronize(DEVICE)
    assert differing(found, expected)
    assert differing(run(streamed), expected) == []  # and nothing of it stays
