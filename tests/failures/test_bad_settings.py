"""Settings that cannot work are refused when the engine is built, naming the setting."""

import re

import pytest

from horizon import AdamW, MemoryConfig
from horizon.errors import BudgetError, ConfigError

WIDE = {"hidden_size": 128, "vocab_size": 2048}  # a head of 4 MiB in fp32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:9"}, "device='cuda:9' is not available here: . CUDA devices; use device=cpu or auto"),
        ({"device": "tpu"}, "device='tpu' is no device; expected auto, cpu, cuda or cuda:<index>"),
        ({"device": "meta"}, "device='meta' is not available here"),
        ({"kernels": "fast"}, "kernels='fast': expected one of auto, liger, torch"),
        ({"kernels": "liger"}, "kernels=liger needs a CUDA device"),
        ({"compute_dtype": "fp8"}, "compute_dtype='fp8': expected one of auto, bfloat16, float32"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite='ignore': expected one of stop, skip"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be > 0, or null for no clipping, got -1"),
        ({"max_grad_norm": 0}, "max_grad_norm must be > 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be > 0"),
        ({"clip": "late"}, "clip='late': expected one of exact, speculative, lagged"),
        ({"clip": "lagged", "max_grad_norm": None}, "clip=lagged has no norm to clip to, as max_grad_norm is null"),
        ({"clip": "speculative", "max_grad_norm": None}, "clip=speculative has no norm to clip to"),
        (
            {"clip": "lagged", "on_nonfinite": "skip"},
            "clip=lagged updates blocks before .* on_nonfinite=skip cannot drop",
        ),
        ({"clip": "speculative", "optimizer": AdamW(betas=(0.95, 0.9))}, r"only where beta1\^2 < beta2, got betas"),
        ({"freeze": ["model.layer.*"]}, r"model.freeze='model.layer.\*' matches no parameter; names look like 'model."),
        ({"freeze": ["*"]}, "model.freeze leaves no parameter to train"),
        ({"freeze": "model.embed_tokens.*"}, "expected a list of name patterns"),
        ({"optimizer": "adamw"}, "optimizer='adamw': expected a horizon.AdamW"),
        ({"memory": {"weight_slots": 2}}, "memory={'weight_slots': 2}: expected a horizon.MemoryConfig"),
        ({"memory": MemoryConfig(weight_slots=0)}, "memory.weight_slots must be >= 1 .* got 0"),
        ({"memory": MemoryConfig(update_threads=0)}, "memory.update_threads must be >= 1, got 0"),
        ({"memory": MemoryConfig(host_budget="lots")}, "memory.host_budget='lots' is not a size"),
        ({"memory": MemoryConfig(device_budget="24Gib/s")}, "memory.device_budget='24Gib/s' is not a size"),
        ({"memory": MemoryConfig(device_budget="-1GiB")}, "memory.device_budget='-1GiB' is not a size"),
        ({"memory": MemoryConfig(device_budget="0GiB")}, "memory.device_budget='0GiB' is not a size"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_named(build, fails, tools, settings, message):
    with fails(ConfigError, message):
        build(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1e-3}, "lr must be finite and >= 0, got -0.001; set optim.lr"),
        ({"lr": float("inf")}, "lr must be finite"),
        (
            {"betas": (0.9, 1.0)},
            r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\); set optim.beta1, optim.beta2",
        ),
        ({"betas": (-0.1, 0.9)}, "betas must be two numbers"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"eps": 0.0}, "eps must be finite and > 0"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0"),
        ({"moments": "fp8"}, "optim.moments='fp8': expected one of float32, bfloat16, int8"),
    ],
    ids=str,
)
def test_an_optimizer_setting_that_cannot_work_is_named(fails, settings, message):
    with fails(ConfigError, message):
        AdamW(**settings)


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1e-3])
def test_a_learning_rate_set_on_the_engine_is_checked_before_the_step(build, fails, tools, healthy, lr):
    engine = build(optimizer=AdamW(lr=1e-5))
    engine.lr = lr
    with fails(ConfigError, f"engine.lr={lr}: expected a finite number"):
        engine.step(tools.make_batch(0))
    engine.lr = 1e-5
    assert tools.equal(tools.train(engine)[1], healthy[1])


def test_a_huge_budget_is_no_overflow(build, tools):
    assert build(memory=MemoryConfig(host_budget="9" * 400)).step(tools.make_batch(0)).num_tokens == 30


def smallest(error, key):
    """The value that the message recommends."""
    return re.search(rf"the smallest {re.escape(key)} that works is (\d+)MiB ", str(error.value))[1]


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_a_device_budget_too_small_for_a_block_says_the_smallest_that_works(build, fails, tools, max_grad_norm):
    def with_budget(mib):
        memory = MemoryConfig(device_budget=f"{mib}MiB")
        return build({**tools.LLAMA, **WIDE}, memory=memory, max_grad_norm=max_grad_norm)

    with fails(BudgetError, "of device memory .*weight slots.* but 1 MiB is allowed") as error:
        with_budget(1)
    least = int(smallest(error, "memory.device_budget"))
    assert least > 4
    with fails(BudgetError, "too little"):
        with_budget(least - 1)
    assert with_budget(least).step(tools.make_batch(0, rows=1)).num_tokens == 15


def test_a_host_budget_too_small_for_the_states_says_the_smallest_that_works(build, fails, tools):
    def with_budget(mib):
        return build({**tools.LLAMA, **WIDE}, memory=MemoryConfig(host_budget=f"{mib}MiB"))

    with fails(BudgetError, "of host memory .*exp_avg.* but 8 MiB is allowed") as error:
        with_budget(8)
    assert with_budget(smallest(error, "memory.host_budget")).step(tools.make_batch(0)).num_tokens == 30


def test_a_batch_too_large_for_the_device_budget_says_what_would_fit_and_a_smaller_one_trains(build, fails, tools):
    memory = MemoryConfig(device_budget="1MiB")
    big, small = tools.make_batch(0, rows=64, tokens=64), tools.make_batch(0, rows=2)
    with fails(BudgetError, "hidden states .*train.micro_batch or train.batch_size") as error:
        build(memory=memory).step(big)
    engine = build(memory=memory)
    with fails(BudgetError, "hidden states"):
        engine.step(big)
    losses = [engine.step(small).loss, build().step(small).loss]
    assert losses[0] == losses[1]
    enough = MemoryConfig(device_budget=f"{smallest(error, 'memory.device_budget')}MiB")
    assert build(memory=enough).step(big).num_tokens == 64 * 63


def test_gradients_to_add_up_that_do_not_fit_leave_the_engine_as_it_was(build, fails, tools, monkeypatch):
    monkeypatch.setattr("horizon.runtime.host_overhead", lambda device: 500 << 20)  # the same for both engines
    deep = {**tools.LLAMA, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12}
    with build(deep, max_grad_norm=None) as engine:
        expected = engine.step(tools.make_batch(0)).loss
        budget = engine.plan.num_bytes("host")  # fp32 gradients of all blocks take 34 MiB more
    engine = build(deep, max_grad_norm=None, memory=MemoryConfig(host_budget=str(budget)))
    with fails(BudgetError, "gradients .*memory.host_budget"):
        engine.forward_backward(tools.make_batch(0))
    assert engine.step(tools.make_batch(0)).loss == expected
