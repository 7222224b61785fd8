"""Streamed steps are plain MeZO's, bit for bit, whatever the schedule."""

import pytest
import torch

import horizon
from horizon.zo import perturb
from horizon.zo import runtime as zo_runtime
from horizon.zo.noise import GROUP
from tests.covering import pairwise
from tests.parity.reference import BASE, assert_same_tensors, build, packed, padded, plain
from tests.zo.reference import (
    PlainMezo,
    PlainPerturber,
    counter_noise,
    decays_of,
    engine_for,
    layouts_of,
    masters,
    one_rounding,
    sequential_noise,
)

LR, EPS = 1e-2, 1e-3
STEPS = [[plain(0)], [plain(1), plain(2)], [padded(3, [12, 7])], [plain(4)]]


def settings(**changes):
    return horizon.ZerothOrder(**{"lr": LR, "eps": EPS, "weight_decay": 0.1, **changes})


def run(engine, steps=STEPS):
    return [engine.step(list(step)) for step in steps]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_with_mezos_own_generator_every_step_is_the_plain_one(family, tied, monkeypatch):
    model = build(family, tie_word_embeddings=tied)
    draw, chosen = sequential_noise(model), settings(queries=2)
    monkeypatch.setattr(zo_runtime, "make_perturber", lambda lays, chosen, _: PlainPerturber(lays, chosen, draw))
    with engine_for(model, chosen) as engine:
        reference = PlainMezo(model, chosen, draw, decays=decays_of(engine))
        for number, batches in enumerate(STEPS, start=1):
            result, (loss, projected) = engine.step(list(batches)), reference.step(batches, LR)
            assert (result.loss, list(result.projected_gradients)) == (loss, projected), f"step {number}"
        assert_same_tensors(masters(engine), reference.weights)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("opt", {"queries": 3}),
        ("gpt2", {"momentum": 0.8, "momentum_steps": 3}),
        ("gemma2", {"queries": 2, "momentum": 0.8, "momentum_steps": 3}),
        ("mixtral", {"queries": 3}),
    ],
    ids=str,
)
def test_with_horizons_noise_every_step_is_the_plain_one(family, changes):
    model, chosen = build(family), settings(seed=11, **changes)
    with engine_for(model, chosen) as engine:
        draw = counter_noise(layouts_of(engine), 11)
        reference = PlainMezo(model, chosen, draw, one_rounding, decays_of(engine))
        for batches in STEPS:
            result, (loss, projected) = engine.step(list(batches)), reference.step(batches, LR)
            assert (result.loss, list(result.projected_gradients)) == (loss, projected)
        assert_same_tensors(masters(engine), reference.weights)
        assert all(
            not torch.equal(value, dict(model.named_parameters())[name]) for name, value in masters(engine).items()
        )


def test_packed_rows_step_as_plain_ones():
    model, chosen, batches = build("llama"), settings(), [packed(0, [[5, 7], [4, 8]])]
    with engine_for(model, chosen) as engine:
        reference = PlainMezo(model, chosen, counter_noise(layouts_of(engine), 0), one_rounding, decays_of(engine))
        assert engine.step(batches).loss == reference.step(batches, LR)[0]


@pytest.mark.parametrize("master", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tied", [False, True])
def test_without_a_learning_rate_no_bit_moves(master, tied):
    model = build("llama", tie_word_embeddings=tied)
    with engine_for(model, settings(lr=0.0, eps=1e-2, master=master)) as engine:
        before = masters(engine)
        for step in range(60):
            engine.step(plain(step % 7, rows=1, tokens=3))
            if step % 20 == 0:
                engine.evaluate(plain(0))
        assert_same_tensors(masters(engine), before)


@pairwise(master=["fp32", "bf16", "fp16"], every=[2, 3, 100], tied=[False, True])
def test_writing_back_less_often_changes_no_bit(master, every, tied):
    model = build("llama", tie_word_embeddings=tied)
    steps = [[plain(i)] for i in range(7)]
    with engine_for(model, settings(master=master)) as engine:
        expected = [result.loss for result in run(engine, steps)], masters(engine)
    with engine_for(model, settings(master=master, writeback_every=every)) as engine:
        assert [result.loss for result in run(engine, steps)] == expected[0]
        assert_same_tensors(masters(engine), expected[1])


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_the_number_of_slots_changes_no_bit(slots):
    model = build("llama", tie_word_embeddings=True)
    with engine_for(model, settings()) as engine:
        expected = [result.loss for result in run(engine)], masters(engine)
    with engine_for(model, settings(), memory=horizon.MemoryConfig(weight_slots=slots)) as engine:
        assert [result.loss for result in run(engine)] == expected[0]
        assert_same_tensors(masters(engine), expected[1])


@pytest.mark.parametrize("master", ["fp32", "fp16"])
def test_the_pieces_that_the_host_takes_change_no_bit(monkeypatch, master):
    model = build("llama", tie_word_embeddings=True)
    with engine_for(model, settings(master=master)) as engine:
        assert max(layout.num_elements for layout in layouts_of(engine)) > 3 * GROUP
        expected = [result.loss for result in run(engine)], masters(engine)
    monkeypatch.setattr(perturb, "PIECE", GROUP)
    with engine_for(model, settings(master=master)) as engine:
        assert [result.loss for result in run(engine)] == expected[0]
        assert_same_tensors(masters(engine), expected[1])


def test_micro_batches_change_nothing_but_the_order_of_summation():
    batch = plain(0, rows=4)
    split = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(4)]
    model = build("llama")
    results = []
    for batches in ([batch], split):
        with engine_for(model, settings()) as engine:
            results.append(engine.step(batches))
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert results[0].projected_gradients[0] == pytest.approx(results[1].projected_gradients[0], abs=1e-3)


def test_the_estimate_is_the_derivative_along_z():
    model = build("llama")
    with horizon.Engine.from_pretrained(model, device="cpu", self_check=False) as engine:
        engine.forward_backward(plain(0))
        gradients = dict(engine.named_gradients())
    with engine_for(model, settings(eps=1e-3)) as engine:
        z = counter_noise(layouts_of(engine), 0)(1, 0)
        derivative = sum(float((gradients[name] * z[name]).sum()) for name in gradients)
        assert engine.step(plain(0)).projected_gradients[0] == pytest.approx(derivative, rel=0.02)


def test_frozen_parameters_are_neither_perturbed_nor_moved():
    model, patterns = build("llama"), ["model.embed_tokens.*", "*.mlp.*", "model.layers.1.*"]
    with engine_for(model, settings(), freeze=patterns) as engine:
        frozen = {p.name for layout in layouts_of(engine) for p in layout.params if not p.spec.trainable}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        reference = PlainMezo(model, settings(), counter_noise(layouts_of(engine), 0), one_rounding, decays_of(engine))
        for batches in STEPS:
            assert engine.step(list(batches)).loss == reference.step(batches, LR)[0]
        found = masters(engine)
        assert_same_tensors(found, reference.weights)
    assert frozen and all(torch.equal(found[n], p) is (n in frozen) for n, p in model.named_parameters())


def test_both_users_of_a_tied_embedding_see_one_noise():
    """Were the head's copy perturbed otherwise, the loss would not be that of one perturbed matrix."""
    model = build("gpt2", tie_word_embeddings=True)
    with engine_for(model, settings(eps=0.05)) as engine:
        reference = PlainMezo(model, settings(eps=0.05), counter_noise(layouts_of(engine), 0), one_rounding)
        assert reference.model.lm_head.weight is reference.model.transformer.wte.weight
        assert engine.step(plain(0)).loss == reference.step([plain(0)], LR)[0]


def test_dropout_takes_no_part():
    model = build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    with engine_for(model, settings()) as engine:
        reference = PlainMezo(model, settings(), counter_noise(layouts_of(engine), 0), one_rounding)
        assert engine.step(plain(0)).loss == reference.step([plain(0)], LR)[0]


def test_a_learning_rate_of_each_step_is_taken():
    model = build("llama")
    with engine_for(model, settings()) as engine:
        reference = PlainMezo(model, settings(), counter_noise(layouts_of(engine), 0), one_rounding, decays_of(engine))
        for lr, batches in zip((1e-2, 3e-3, 0.0, 1e-3), STEPS, strict=True):
            engine.lr = lr
            engine.step(list(batches))
            reference.step(batches, lr)
        assert_same_tensors(masters(engine), reference.weights)


@pytest.mark.parametrize("master", ["bf16", "fp16"])
def test_updates_below_the_last_place_of_a_16_bit_master_are_not_lost_on_average(master):
    model = build("llama", hidden_size=128, intermediate_size=256)
    chosen, lr = settings(master=master, weight_decay=0.0, eps=1e-2), {"bf16": 1e-6, "fp16": 1e-7}[master]
    with engine_for(model, chosen, compute_dtype="float32") as engine:
        before, projected = masters(engine), []
        engine.lr = lr
        for i in range(40):
            projected.append(engine.step(plain(i)).projected_gradients[0])
        draw, after = counter_noise(layouts_of(engine), 0), masters(engine)
    name = "model.layers.0.mlp.up_proj.weight"
    exact = sum(-lr * g * draw(i + 1, 0)[name] for i, g in enumerate(projected))
    moved = after[name] - before[name]
    assert torch.mean((moved == 0).float()) > 0.3  # to the nearest, nearly all would stand still
    slope = float((moved * exact).sum() / (exact * exact).sum())
    assert slope == pytest.approx(1, abs=0.35)


def test_host_memory_is_two_or_four_bytes_a_parameter():
    big = {**BASE, "model_type": "llama", "hidden_size": 256, "intermediate_size": 1024, "vocab_size": 4096}
    for master, least, most in (("fp32", 4, 4.2), ("bf16", 2, 2.1), ("fp16", 2, 2.1)):
        with engine_for(big, settings(master=master)) as engine:
            held = engine._runtime.store.num_bytes / engine.plan.num_parameters
            planned = sum(line.num_bytes for line in engine.plan.lines if line.tier == "host")
            framework = next(line.num_bytes for line in engine.plan.lines if line.purpose == "framework")
            assert least <= held <= most
            assert (planned - framework) / engine.plan.num_parameters == pytest.approx(held, rel=0.05)  # whole pages
