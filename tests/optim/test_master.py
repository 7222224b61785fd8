"""Masters that are bf16 weights alone: an fp32 update, rounded stochastically to what is kept."""

import numpy as np
import pytest
import torch

from horizon import AdamW, MemoryConfig
from horizon.config.compose import compose
from horizon.config.schema import MasterFormat, Moments
from horizon.errors import ConfigError
from horizon.optim.adamw import step_scalars
from horizon.optim.moments import noise, random_bits
from horizon.optim.states import update_order
from horizon.optim.updater import load_update, torch_update
from tests.parity.reference import LR, assert_same_tensors, build, engine_for, plain

BF16 = MasterFormat.bf16_stochastic
KINDS = {torch.bfloat16: np.uint16, torch.int16: np.uint16, torch.uint8: np.uint8, torch.float32: np.float32}
ALL = pytest.mark.parametrize("moments", list(Moments))


def draw(length, seed=0):
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(length) * 10.0 ** generator.integers(-6, 1, length)
    values[::7] = 0
    return values.astype(np.float32)


def to_bf16(values):
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def to_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def new_arrays(moments, master, weights, grads):
    arrays = {s.name: np.zeros(s.span(0, weights.size).stop, KINDS[s.dtype]) for s in update_order(moments, master)}
    return arrays | {"weights": weights.copy(), "grads": grads}


def apply(update, moments, master, arrays, step, first=0, span=slice(None), scalars=None):
    order = update_order(moments, master)
    start, stop = span.start or 0, span.stop or arrays["weights"].size
    parts = [arrays[state.name][state.span(start, stop)] for state in order]
    scalars = scalars or step_scalars(AdamW(weight_decay=0.1), 1e-3, step, 0.5, True)
    rounds = moments is not Moments.float32 or master is not MasterFormat.split
    update(*parts, scalars, *([noise(7, step, 3, first + start)] if rounds else []))


@ALL
@pytest.mark.parametrize("grad_bits", [False, True])
@pytest.mark.parametrize("length", [1, 64, 1000, 70_001])
def test_compiled_and_plain_updates_are_bit_equal(moments, grad_bits, length):
    weights = to_bf16(draw(length, 1) * np.float32(0.02))
    compiled, slow = (new_arrays(moments, BF16, weights, None) for _ in range(2))
    for step in range(1, 5):
        grads = draw(length, 10 + step)
        for arrays, update in ((compiled, load_update(moments, BF16)), (slow, torch_update(moments, BF16))):
            arrays["grads"] = to_bf16(grads) if grad_bits else grads
            apply(update, moments, BF16, arrays, step)
    for name, array in compiled.items():
        assert np.array_equal(array, slow[name]), name


@ALL
def test_the_update_is_that_of_a_split_master_rounded_up_or_down(moments):
    """From the same weights: what is kept is one of the two bf16 neighbours, by the element's other random bits."""
    length = 50_000
    weights, grads = to_bf16(draw(length, 1)), draw(length, 2)
    split, kept = (new_arrays(moments, master, weights, grads) for master in (MasterFormat.split, BF16))
    apply(load_update(moments), moments, MasterFormat.split, split, 1)
    apply(load_update(moments, BF16), moments, BF16, kept, 1)
    low = split["residual"].astype(np.uint32)
    exact = (split["weights"].astype(np.uint32) << 16) - ((low & 0x8000) << 1) + low
    random = random_bits(noise(7, 1, 3, 1 << 31), length) & 0xFFFF
    assert np.array_equal(kept["weights"], ((exact + random) >> 16).astype(np.uint16))
    for name in kept.keys() - {"weights"}:
        assert np.array_equal(kept[name], split[name]), name


@ALL
def test_chunks_change_no_bit(moments):
    length = 5000
    weights, grads = to_bf16(draw(length, 1)), draw(length, 2)
    whole, cut = (new_arrays(moments, BF16, weights, grads) for _ in range(2))
    update = load_update(moments, BF16)
    apply(update, moments, BF16, whole, 1)
    for start in range(0, length, 640):
        apply(update, moments, BF16, cut, 1, span=slice(start, min(start + 640, length)))
    assert all(np.array_equal(whole[name], cut[name]) for name in whole)


def test_zeros_stay_zeros():
    for moments in Moments:
        arrays = new_arrays(moments, BF16, np.zeros(256, np.uint16), np.zeros(256, np.float32))
        apply(load_update(moments, BF16), moments, BF16, arrays, 1)
        assert not any(array.any() for array in arrays.values())


def test_weights_move_on_average_where_the_nearest_bf16_would_stand_still():
    """A step of 1/100 of bf16's spacing: a hundredth of all weights moves, each by one spacing."""
    length, lr = 200_000, 2.0**-8 / 100
    arrays = new_arrays(Moments.float32, BF16, to_bf16(np.ones(length, np.float32)), np.ones(length, np.float32))
    scalars = step_scalars(AdamW(weight_decay=0.0), lr, 1, 1.0, False)
    apply(load_update(Moments.float32, BF16), Moments.float32, BF16, arrays, 1, scalars=scalars)
    moved = to_float(arrays["weights"])
    assert set(np.unique(moved)) == {np.float32(1), np.float32(1 - 2.0**-8)}
    assert moved.mean(dtype=np.float64) == pytest.approx(1 - lr, abs=4 * 2.0**-8 * 0.1 / length**0.5)


def test_the_moments_random_bits_are_not_the_weights():
    first = noise(7, 1, 3)
    own, other = random_bits(first, 10_000), random_bits(first ^ np.uint32(1 << 31), 10_000)
    assert abs(np.corrcoef(own & 0xFFFF, other & 0xFFFF)[0, 1]) < 0.05
    assert abs(np.corrcoef(own >> 16, other & 0xFFFF)[0, 1]) < 0.05


# ---- whole engines


def masters(model, **settings):
    with engine_for(model, **settings) as engine:
        losses = [engine.step([plain(seed), plain(seed + 9)]).loss for seed in range(4)]
        return losses, dict(engine.named_master_parameters())


@pytest.mark.parametrize("moments", ["float32", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_slots_threads_and_tiers_change_no_bit(moments, dtype, tied, tmp_path):
    settings = {"optimizer": AdamW(lr=LR, moments=moments, master="bf16_stochastic"), "compute_dtype": dtype}
    expected, weights = masters(build("llama", tie_word_embeddings=tied), **settings)
    for memory in (
        MemoryConfig(weight_slots=1, update_threads=3),
        MemoryConfig(policy="nvme_all", nvme_dir=str(tmp_path)),
        MemoryConfig(policy="nvme_optimizer", nvme_dir=str(tmp_path)),
    ):
        found, others = masters(build("llama", tie_word_embeddings=tied), memory=memory, **settings)
        assert found == expected
        assert_same_tensors(others, weights)
    assert all(torch.equal(value, value.bfloat16().float()) for value in weights.values())


def test_fp32_computes_with_the_bf16_weights_and_the_plan_has_no_residual():
    settings = {"optimizer": AdamW(lr=LR, master="bf16_stochastic")}
    with engine_for(build("llama"), **settings) as engine:
        lines = {line.purpose: line.num_bytes for line in engine.plan.lines if line.tier == "host"}
        assert lines["residual (low halves)"] == 0 and lines["weights (bf16)"] > 0
        assert "residual" not in engine._runtime.store.states(1)
        rounded = build("llama")
        with torch.no_grad():
            for parameter in rounded.parameters():
                parameter.copy_(parameter.bfloat16())
        with engine_for(rounded) as exact:
            assert engine.evaluate(plain(0)) == exact.evaluate(plain(0))


def test_a_small_model_learns_as_with_split_masters():
    found = {}
    for master in MasterFormat:
        with engine_for(build("llama"), optimizer=AdamW(lr=LR, master=master)) as engine:
            found[master] = [engine.step(plain(0)).loss for _ in range(15)]
    assert found[BF16][-1] < 0.2 * found[BF16][0]
    assert found[BF16] == pytest.approx(found[MasterFormat.split], rel=0.2)


def test_a_saved_model_has_the_bf16_values(tmp_path):
    with engine_for(build("llama"), optimizer=AdamW(lr=LR, master="bf16_stochastic")) as engine:
        engine.step(plain(0))
        engine.save_pretrained(tmp_path / "model")
        saved = dict(engine.named_master_parameters())
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert all(torch.equal(parameter, saved[name]) for name, parameter in loaded.named_parameters())


def test_what_does_not_go_with_it_is_refused():
    bf16 = AdamW(master="bf16_stochastic")
    with pytest.raises(ConfigError, match="takes updates back only from split masters"):
        engine_for(build("llama"), optimizer=bf16, clip="speculative")
    for memory in (MemoryConfig(policy="hbm_first"), MemoryConfig(hbm_blocks=1)):
        with pytest.raises(ConfigError, match=r"with optim.master=bf16_stochastic: blocks in HBM have split masters"):
            engine_for(build("llama"), optimizer=bf16, memory=memory)
    with pytest.raises(ConfigError, match=r"optim.master='bf16': expected one of split, bf16_stochastic"):
        AdamW(master="bf16")
    assert compose(["optim.master=bf16_stochastic"]).optim.master is BF16
    assert compose(["optim.master=split"]).optim.master is MasterFormat.split
