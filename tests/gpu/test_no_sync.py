"""A step never makes the host wait for the device, from its start to where the engine reads the loss and the norm."""

import pytest
import torch

import horizon
from horizon.config.compose import compose
from horizon.trainer import RECORDED, Trainer
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
    runtime, updates = streamed._runtime, streamed._runtime._steps._updates
    run_step, finish = runtime.run_step, updates.finish

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run_step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def finished():
        """The last event that the host waits for; what follows reads the loss and the norm."""
        finish()
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(runtime, "run_step", watched)
    monkeypatch.setattr(updates, "finish", finished)


@pytest.mark.parametrize("offloaded", [False, True], ids=["device", "offloaded"])
@pytest.mark.parametrize("clip", [None, "exact", "speculative", "lagged"])
@pytest.mark.parametrize("make", [batches, long, packed, padded])
def test_a_step_makes_the_host_wait_for_nothing(monkeypatch, offload_everything, make, clip, offloaded):
    if offloaded:
        offload_everything()
    clipping = {"max_grad_norm": None} if clip is None else {"clip": clip}
    with engine(build("llama"), compute_dtype="bfloat16", **clipping) as streamed:
        streamed.step(make()), streamed.step(make())  # kernels compile, the working set is measured
        watch(streamed, monkeypatch)
        assert streamed.step(make()).loss > 0


@pytest.mark.parametrize("hbm_blocks", [0, 4])
def test_a_step_with_layers_at_the_turn_makes_the_host_wait_for_nothing(monkeypatch, hbm_blocks):
    memory = horizon.MemoryConfig(turn_layers=2, hbm_blocks=hbm_blocks)
    with engine(build("llama"), compute_dtype="bfloat16", memory=memory) as streamed:
        streamed.step(long()), streamed.step(long())
        watch(streamed, monkeypatch)
        assert streamed.step(long()).loss > 0


def test_a_synchronisation_is_noticed(monkeypatch):
    def asking(logits, batch):
        loss = logits.float().logsumexp(-1).mean()
        return loss * (1 if loss > 0 else 2)

    with engine(build("llama"), compute_dtype="bfloat16") as streamed:
        streamed.step(batches(), loss_fn=asking)
        watch(streamed, monkeypatch)
        with pytest.raises(RuntimeError, match="synchroniz"):
            streamed.step(batches(), loss_fn=asking)


def test_a_run_makes_the_host_wait_for_nothing_between_its_steps(monkeypatch, tmp_path):
    class Listener(horizon.Callback):
        def on_step(self, row):
            heard.append(row.loss)

    step, heard, num_steps = horizon.Engine.step, [], 9

    def watched(engine, batches):
        torch.cuda.set_sync_debug_mode("default")
        result = step(engine, batches)
        if RECORDED[1] < engine.num_steps < num_steps:  # behind the recorded steps, and before the end
            torch.cuda.set_sync_debug_mode("error")
        return result

    monkeypatch.setattr(horizon.Engine, "step", watched)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    config = compose(
        ["data=text", f"data.path={tmp_path / 'text.txt'}", "data.tokenizer=bytes", f"train.steps={num_steps}",
         "train.seq_len=64", "train.sample_tokens=0", "train.save=false", "eval.rows=0", "device=cuda"]
    )  # fmt: skip
    Trainer(config, tmp_path / "run", callbacks=[Listener()]).run()
    assert len(heard) == num_steps
