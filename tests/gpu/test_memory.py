"""What the device and pinned host memory hold while an engine works, when it fails and after it is gone."""

import gc

import pytest
import torch

import horizon
from horizon.errors import BudgetError
from horizon.stream.streams import Streams
from horizon.units import MIB
from tests.gpu.models import DEVICE, EAGER, batches, build, differing, engine, gradients

pytestmark = pytest.mark.gpu

VOCAB, TOKENS = 2048, 512
MEDIUM = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": TOKENS,
}  # fmt: skip
BOUNDARY = 32 * TOKENS * 1024 * 2  # of a step of 32 rows


def peak_of_a_step(budget="auto", recompute="full", turn_layers=0):
    """(planned, measured peak, bytes by purpose of activations) of steps of 4 micro-batches, 8 rows each."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    memory = horizon.MemoryConfig(device_budget=budget, recompute=recompute, turn_layers=turn_layers)
    with engine(MEDIUM, compute_dtype="bfloat16", memory=memory) as streamed:
        for seed in range(2):
            streamed.step(batches(4, rows=8, tokens=TOKENS, vocab=VOCAB, seed=seed))
        purposes = {line.purpose: line.num_bytes for line in streamed.plan.activations}
        return streamed.plan.num_bytes("device"), streamed.device_bytes, purposes


def test_the_devices_peak_is_what_was_planned_and_stays_in_the_budget():
    planned, measured, purposes = peak_of_a_step()
    assert purposes["boundaries of 8 blocks"] == 8 * BOUNDARY
    assert measured <= planned + 256 * MIB
    budget = planned - 4 * BOUNDARY
    planned, measured, purposes = peak_of_a_step(str(budget))
    assert "boundaries of 8 blocks" not in purposes
    assert planned <= budget
    assert measured <= min(budget, planned + 256 * MIB)


@pytest.mark.parametrize("spare", [400 * MIB, 1200 * MIB])
def test_spare_memory_is_used_to_keep_what_would_be_run_again_and_no_more(spare):
    planned, _, _ = peak_of_a_step()
    budget = planned + spare
    planned, measured, purposes = peak_of_a_step(str(budget), "auto")
    assert any("linear outputs" in purpose or "graphs" in purpose for purpose in purposes)
    assert planned <= budget
    assert measured <= min(budget, planned + 256 * MIB)


@pytest.mark.parametrize("turn_layers", [3, 8])
def test_what_layers_at_the_turn_take_is_planned(turn_layers):
    plain = peak_of_a_step()
    planned, measured, purposes = peak_of_a_step(turn_layers=turn_layers)
    assert f"graphs of {turn_layers} turn layers" in purposes
    assert measured <= planned + 256 * MIB
    more_planned, more_measured = planned - plain[0], measured - plain[1]
    assert abs(more_planned - more_measured) <= max(256 * MIB, 0.03 * planned)


def test_a_budget_that_cannot_work_is_refused_before_anything_is_allocated():
    gc.collect()
    before = torch.cuda.memory_allocated(DEVICE)
    with pytest.raises(BudgetError, match=r"of device memory .*the smallest memory.device_budget that works is"):
        engine(MEDIUM, compute_dtype="bfloat16", memory=horizon.MemoryConfig(device_budget="100MiB"))
    assert torch.cuda.memory_allocated(DEVICE) == before


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_running_out_of_device_memory_is_a_budget_error_and_the_engine_goes_on(max_grad_norm):
    model, step = build("llama", **EAGER), batches(2)

    def greedy(logits, batch):
        return logits.mean() + torch.empty(1 << 46, dtype=torch.uint8, device=logits.device).sum()

    weights = []
    for fails in (False, True):
        with engine(model, max_grad_norm=max_grad_norm) as streamed:
            streamed.step(batches(2, seed=1))
            if fails:
                with pytest.raises(BudgetError, match="the device ran out of memory"):
                    streamed.step(step, loss_fn=greedy)
            streamed.step(step)
            weights.append(dict(streamed.named_master_parameters()))
    assert differing(*weights) == []


def test_engines_come_and_go_in_one_process_and_leave_nothing():
    model, step, found, left = build("llama", **EAGER), batches(), [], []
    for _ in range(3):
        with engine(model, compute_dtype="float32") as streamed:
            store = streamed._runtime.store
            assert all(block.is_pinned() for block in (*store.weights, *store.residual) if block.numel())
            assert not store.moments["exp_avg"][0].is_pinned()
            found.append(gradients(streamed, step))
        del streamed, store
        gc.collect()
        left.append(torch.cuda.memory_allocated(DEVICE))
    assert left[0] == left[1] == left[2]  # what libraries keep
    assert differing(found[1], found[0]) == differing(found[2], found[0]) == []


def test_a_closed_engine_leaves_the_device_to_the_next_though_it_is_referred_to():
    step, kept = batches(tokens=64, vocab=4096), []
    model = build("llama", vocab_size=4096, hidden_size=1024, intermediate_size=4096, max_position_embeddings=64)
    for hbm_blocks in (0, 2):
        before = torch.cuda.memory_allocated(DEVICE)
        streamed = engine(model, memory=horizon.MemoryConfig(hbm_blocks=hbm_blocks))
        planner = streamed._runtime.planner
        streamed.step(step)
        in_use = torch.cuda.memory_allocated(DEVICE) - before
        streamed.close()
        kept.append((streamed, planner))
        gc.collect()  # what else this test has made
        assert torch.cuda.memory_allocated(DEVICE) - before < 0.2 * in_use


def test_two_engines_share_a_device():
    model, step = build("llama", **EAGER), batches()
    with engine(model) as first, engine(model) as second:
        assert differing(gradients(first, step), gradients(second, step)) == []


def test_copies_have_streams_of_their_own_and_compute_is_the_users():
    streams = Streams.on(torch.device(DEVICE, 0))
    assert streams.compute == torch.cuda.current_stream(DEVICE)
    assert len({s.cuda_stream for s in (streams.compute, streams.fetch, streams.drain, streams.update)}) == 4
