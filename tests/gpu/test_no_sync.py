"""A step never makes the host wait for the device, from its start to where the engine reads the loss and the norm."""

import pytest
import torch

from tests.gpu.models import TOKENS, batches, build, engine, padded

pytestmark = pytest.mark.gpu


def packed():
    """Two documents a row."""
    (batch,) = batches()
    positions = torch.cat([torch.arange(TOKENS // 2), torch.arange(TOKENS - TOKENS // 2)])
    return [{**batch, "position_ids": positions.expand_as(batch["input_ids"]).clone()}]


def long():
    """Enough tokens for the embedding's other backward kernel, in two micro-batches."""
    return batches(2, rows=80, tokens=TOKENS)


@pytest.fixture(autouse=True)
def mode_restored():
    yield
    torch.cuda.set_sync_debug_mode("default")


def watch(streamed, monkeypatch):
    """From now on a synchronisation between a step's start and the reading of its loss is an error."""
    run_step = streamed._runtime.run_step

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run_step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(streamed._runtime, "run_step", watched)


@pytest.mark.parametrize("offloaded", [False, True], ids=["device", "offloaded"])
@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize("make", [batches, long, packed, padded])
def test_a_step_makes_the_host_wait_for_nothing(monkeypatch, offload_everything, make, max_grad_norm, offloaded):
    if offloaded:
        offload_everything()
    with engine(build("llama"), compute_dtype="bfloat16", max_grad_norm=max_grad_norm) as streamed:
        streamed.step(make()), streamed.step(make())  # kernels compile, the working set is measured
        watch(streamed, monkeypatch)
        assert streamed.step(make()).loss > 0


def test_a_synchronisation_is_noticed(monkeypatch):
    def asking(logits, batch):
        loss = logits.float().logsumexp(-1).mean()
        return loss * (1 if loss > 0 else 2)

    with engine(build("llama"), compute_dtype="bfloat16") as streamed:
        streamed.step(batches(), loss_fn=asking)
        watch(streamed, monkeypatch)
        with pytest.raises(RuntimeError, match="synchroniz"):
            streamed.step(batches(), loss_fn=asking)
