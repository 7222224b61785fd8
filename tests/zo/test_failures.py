"""What cannot be done is refused by name; what fails on the way leaves the weights at the last step's end."""

import math
from functools import cache

import pytest
import torch

import horizon
from horizon.errors import BatchError, BudgetError, CheckpointError, ConfigError, HorizonError, NonFiniteError
from horizon.models.blocks import BlockModel
from horizon.stream.streams import Streams
from horizon.zo.perturb import HostPerturber
from tests.covering import pairwise
from tests.parity.reference import assert_same_tensors, build, plain
from tests.zo.reference import engine_for, masters

GOOD = {"lr": 1e-2, "eps": 1e-3}


def settings(**changes):
    return horizon.ZerothOrder(**{**GOOD, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "optim.lr"),
        ({"lr": math.inf}, "optim.lr"),
        ({"weight_decay": -0.1}, "optim.weight_decay"),
        ({"eps": 0.0}, "zo.eps"),
        ({"eps": -1e-3}, "zo.eps"),
        ({"eps": math.nan}, "zo.eps"),
        ({"eps": 1e-8, "master": "fp16"}, "zo.eps"),
        ({"queries": 0}, "zo.queries"),
        ({"queries": 65}, "zo.queries"),
        ({"momentum": 1.0, "momentum_steps": 4}, "zo.momentum"),
        ({"momentum": 0.5}, "zo.momentum_steps"),
        ({"momentum_steps": 0}, "zo.momentum_steps"),
        ({"momentum_steps": 4}, "zo.momentum"),
        ({"master": "fp8"}, "zo.master"),
        ({"writeback_every": 0}, "zo.writeback_every"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        settings(**change)


@pytest.mark.parametrize(
    ("master", "compute_dtype", "eps"),
    [("bf16", "bfloat16", 1e-6), ("fp32", "bfloat16", 1e-6), ("fp32", "float32", 1e-12)],
)
def test_an_eps_that_rounds_away_is_refused(master, compute_dtype, eps):
    with pytest.raises(ConfigError, match=r"zo\.eps=.* moves \d+% of the weights"):
        engine_for(build("llama"), settings(master=master, eps=eps), compute_dtype=compute_dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_grad_norm": 0.5}, "no gradients to clip"),
        ({"clip": "lagged"}, "no gradients to clip"),
        ({"memory": horizon.MemoryConfig(recompute="full")}, "memory.recompute=full has no use"),
        ({"memory": horizon.MemoryConfig(policy="hbm_first")}, "memory.policy=hbm_first has no use"),
        ({"memory": horizon.MemoryConfig(hbm_blocks=1)}, "memory.hbm_blocks=1 has no use"),
        ({"memory": horizon.MemoryConfig(update_threads=1)}, "memory.update_threads=1 has no use"),
        ({"memory": horizon.MemoryConfig(turn_layers=1)}, "memory.turn_layers=1 has no use"),
        ({"memory": horizon.MemoryConfig(cxl_nodes=[1])}, "memory.cxl_nodes=\\[1\\] has no use"),
        (
            {"memory": horizon.MemoryConfig(cxl_simulated=horizon.SimulatedCxl(size="1GiB"))},
            "cxl_simulated.size=1GiB has",
        ),
        ({"memory": horizon.MemoryConfig(weight_slots=0)}, "memory.weight_slots"),
    ],
    ids=str,
)
def test_settings_without_a_use_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        engine_for(build("llama"), settings(), **changes)


def test_what_does_not_fit_is_refused_before_it_is_allocated():
    for memory, message in (
        (horizon.MemoryConfig(host_budget="10MiB"), r"memory\.host_budget .* zo\.master=bf16"),
        (horizon.MemoryConfig(device_budget="10KiB"), r"memory\.device_budget"),
    ):
        with pytest.raises(BudgetError, match=message):
            engine_for(build("llama"), settings(), memory=memory)
    with engine_for(build("llama"), settings(), memory=horizon.MemoryConfig(device_budget="1MiB")) as engine:
        with pytest.raises(BudgetError, match=r"train\.micro_batch"):
            engine.step(plain(0, rows=1000))
        assert engine.plan_micro_batch(64, 12) == 64
        engine.step(plain(0))


def test_weights_beyond_fp16_are_refused():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds values that fp16 cannot hold; set zo\.master"):
        engine_for(model, settings(master="fp16"))


def test_what_needs_gradients_says_what_to_use():
    with engine_for(build("llama"), settings()) as engine:
        for use in (lambda: engine.forward_backward(plain(0)), engine.optimizer_step, engine.named_gradients):
            with pytest.raises(HorizonError, match="zeroth-order steps compute no gradients; use step, or AdamW"):
                use()
        engine.step(plain(0))


# ---- losses of one's own


def share_of_odd_tokens(logits, batch):
    """How often an odd token is the likeliest: no gradient anywhere."""
    return float((logits.argmax(-1) % 2).float().mean())


def test_a_loss_without_a_gradient_trains():
    with engine_for(build("llama"), settings(eps=3e-2, lr=3e-3, queries=2)) as engine:
        before = engine.evaluate(plain(9, rows=16), loss_fn=share_of_odd_tokens)
        for i in range(60):
            engine.step(plain(i, rows=16), loss_fn=share_of_odd_tokens)
        assert engine.evaluate(plain(9, rows=16), loss_fn=share_of_odd_tokens) < before - 0.2


def test_losses_of_micro_batches_are_averaged_by_their_tokens():
    def count(logits, batch):
        return torch.tensor(float(batch["input_ids"].numel()))

    with engine_for(build("llama"), settings()) as engine:
        batches = [plain(0, rows=1, tokens=5), plain(1, rows=1, tokens=9)]
        assert engine.step(batches, loss_fn=count).loss == pytest.approx((4 * 5 + 8 * 9) / 12)
        assert engine.evaluate(batches, loss_fn=count) == pytest.approx((4 * 5 + 8 * 9) / 12)


@pytest.mark.parametrize("value", [None, "three", torch.zeros(2), [1.0]], ids=str)
def test_a_loss_that_is_no_number_is_refused_with_the_step(value):
    with engine_for(build("llama"), settings()) as engine:
        engine.step(plain(0))
        before = masters(engine)
        with pytest.raises(BatchError, match=r"step 2: loss_fn must return one number, got"):
            engine.step(plain(0), loss_fn=lambda logits, batch: value)
        assert engine.num_steps == 1
        assert_same_tensors(masters(engine), before)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_reported_with_the_step_and_moves_nothing(bad):
    with engine_for(build("llama"), settings()) as engine:
        engine.step(plain(0))
        before = masters(engine)
        with pytest.raises(
            NonFiniteError, match=r"step 2: the loss is (nan|inf), though every block's output .* loss_fn"
        ):
            engine.step(plain(0), loss_fn=lambda logits, batch: bad)
        assert_same_tensors(masters(engine), before)
        assert engine.step(plain(0)).loss > 0


def test_such_steps_can_be_skipped():
    with engine_for(build("llama"), settings(), on_nonfinite="skip") as engine:
        before = masters(engine)
        assert engine.step(plain(0), loss_fn=lambda logits, batch: math.nan).skipped
        assert_same_tensors(masters(engine), before)
        assert not engine.step(plain(0)).skipped


def test_the_block_that_is_not_finite_is_named():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with engine_for(model, settings()) as engine, pytest.raises(NonFiniteError, match=r"step 1: .* block 'layers\.1'"):
        engine.step(plain(0))


# ---- failures on the way

PLACES = {
    "layer": (BlockModel, "layer"),
    "logits": (BlockModel, "logits"),
    "perturbing": (HostPerturber, "__call__"),
    "half a block perturbed": (HostPerturber, "_run_piece"),
    "copy": (Streams, "copy"),
}


def failing(monkeypatch, place, after):
    """From now on the `after`-th call of `place` fails."""
    kind, name = PLACES[place]
    original, calls = getattr(kind, name), []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(kind, name, broken)


@cache
def undisturbed(every):
    """Losses of five steps that nothing breaks, and the weights after them."""
    with engine_for(build("llama", tie_word_embeddings=True), settings(writeback_every=every)) as engine:
        return [engine.step(plain(i)).loss for i in range(5)], masters(engine)


@pairwise(place=PLACES, after=range(1, 10), every=[1, 2])
def test_a_step_that_fails_on_the_way_leaves_the_weights_at_the_last_steps_end(monkeypatch, place, after, every):
    model, chosen = build("llama", tie_word_embeddings=True), settings(writeback_every=every)
    steps, expected = [plain(i) for i in range(5)], undisturbed(every)
    if place == "half a block perturbed":
        monkeypatch.setattr("horizon.zo.perturb.PIECE", 2048)
    with engine_for(model, chosen) as engine:
        losses = [engine.step(step).loss for step in steps[:3]]
        with monkeypatch.context() as patch:
            failing(patch, place, after)
            try:
                losses.append(engine.step(steps[3]).loss)
            except KeyboardInterrupt:
                assert engine.num_steps == 3
            else:
                assert place != "layer" or after > 4
                assert engine.num_steps == 4
        losses += [engine.step(step).loss for step in steps[len(losses) :]]
        assert losses == expected[0]
        assert_same_tensors(masters(engine), expected[1])


@pytest.mark.parametrize("after", range(1, 12))
def test_a_flush_that_fails_on_the_way_loses_nothing(monkeypatch, after):
    model = build("llama", tie_word_embeddings=True)
    with engine_for(model, settings(writeback_every=10)) as engine:
        losses = [engine.step(plain(i)).loss for i in range(3)]
        expected = masters(engine)
    with engine_for(model, settings(writeback_every=10)) as engine:
        assert [engine.step(plain(i)).loss for i in range(3)] == losses
        with monkeypatch.context() as patch:
            failing(patch, "copy", after)
            with pytest.raises(KeyboardInterrupt):
                masters(engine)
        assert_same_tensors(masters(engine), expected)


# ---- what is pending reaches whoever looks


def test_pending_updates_are_applied_before_evaluation_saving_and_reading(tmp_path):
    from transformers import AutoModelForCausalLM

    model, batch = build("llama", tie_word_embeddings=True), plain(0)
    with engine_for(model, settings(writeback_every=100)) as engine:
        store = engine._runtime.store
        for i in range(3):
            engine.step(plain(i))
        assert min(store.versions) < 3
        found, logits = engine.evaluate(batch), engine.next_token_logits({"input_ids": batch["input_ids"]})
        assert min(store.versions) == 3
        engine.step(plain(3))
        engine.save_pretrained(tmp_path / "model")
        assert min(store.versions) == 4
        weights, after = masters(engine), engine.evaluate(batch)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert all(torch.equal(p, weights[name]) for name, p in saved.named_parameters())
    with torch.no_grad():
        assert after == pytest.approx(float(saved(**batch).loss), rel=1e-6)
    with engine_for(model, settings()) as engine:
        for i in range(3):
            engine.step(plain(i))
        assert engine.evaluate(batch) == found
        assert torch.equal(engine.next_token_logits({"input_ids": batch["input_ids"]}), logits)


def test_a_closed_engine_has_given_its_memory_back_and_says_so():
    engine = engine_for(build("llama"), settings())
    engine.step(plain(0))
    store = engine._runtime.store
    engine.close()
    engine.close()
    assert store.states == []
    with pytest.raises(HorizonError, match="the engine is closed"):
        engine.step(plain(0))


def test_a_trace_accounts_for_a_step():
    with engine_for(build("llama"), settings()) as engine:
        engine.step(plain(0))
        with engine.trace() as recording:
            engine.step(plain(1))
            engine.step(plain(2))
    split = recording.split
    parts = split.arithmetic_ms + split.link_ms + split.optimizer_ms + split.data_ms + split.launch_ms
    assert parts == pytest.approx(split.step_ms, rel=1e-6)
    assert split.backward_ms == 0 < split.forward_ms
    assert {t.direction for t in split.traffic} == {"H2D", "D2H"}
    assert all(t.num_bytes == t.least_bytes > 0 for t in split.traffic)
