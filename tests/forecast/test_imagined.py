"""A forecast and an engine decide alike: the same bytes, the same micro-batches, the same refusals, to the byte."""

import pytest

import horizon
from horizon import runtime
from horizon.config.schema import Clip, MasterFormat, Moments, Policy, Recompute
from horizon.errors import BudgetError
from tests.forecast.conftest import SMALL, machine, settings

MODELS = {
    "untied": SMALL,
    "tied": SMALL | {"tie_word_embeddings": True, "vocab_size": 3000},
    "experts": SMALL | {"model_type": "mixtral", "num_local_experts": 4},
    "opt": {"model_type": "opt", "vocab_size": 1000, "hidden_size": 64, "ffn_dim": 256, "num_hidden_layers": 3,
            "num_attention_heads": 4, "word_embed_proj_dim": 64, "max_position_embeddings": 512, "dropout": 0.0},
}  # fmt: skip
OPTIMS = {
    "exact": {},
    "unclipped": {"optim__max_grad_norm": None},
    "lagged": {"optim__clip": Clip.lagged},
    "int8": {"optim__moments": Moments.int8, "memory__weight_slots": 1},
    "bf16 masters": {"optim__master": MasterFormat.bf16_stochastic},
    "on nvme": {"memory__policy": Policy.nvme_all, "memory__nvme_dir": ".", "memory__nvme_budget": "1GiB"},
}
OVERHEAD = 1000  # of the process, in both


@pytest.fixture(autouse=True)
def same_overhead(monkeypatch):
    monkeypatch.setattr(runtime, "host_overhead", lambda device: OVERHEAD)


def engine_plan(config):
    """(plan, micro-batch) of a real engine, or the refusal."""
    optimizer = horizon.AdamW(lr=1e-5, moments=config.optim.moments, master=config.optim.master)
    try:
        engine = horizon.Engine.from_config(
            config.model.config, optimizer=optimizer, memory=config.memory, max_grad_norm=config.optim.max_grad_norm,
            clip=config.optim.clip, device="cpu", self_check=False,
        )  # fmt: skip
        with engine:
            train = config.train
            rows = engine.plan_micro_batch(train.batch_size, train.seq_len, train.micro_batch)
            return engine.plan, rows
    except BudgetError as error:
        return error, None


def forecast_plan(forecaster, config):
    try:
        forecast = forecaster(config, machine(device=""), OVERHEAD).forecast(config)
        return forecast.plan, forecast.micro_batch
    except BudgetError as error:
        return error, None


def lines(plan):
    return [(line.tier, line.purpose, line.num_bytes) for line in (*plan.lines, *plan.activations)]


@pytest.mark.parametrize("optim", OPTIMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_line_is_that_of_the_engine(forecaster, name, optim):
    config = settings(MODELS[name], train__batch_size=6, **OPTIMS[optim])
    config.memory.host_budget = config.memory.device_budget = "8GiB"
    plan, rows = engine_plan(config)
    forecast, forecast_rows = forecast_plan(forecaster, config)
    assert lines(forecast) == lines(plan)
    assert (forecast_rows, forecast.num_parameters, forecast.limits) == (rows, plan.num_parameters, plan.limits)


@pytest.mark.parametrize("tier", ["host", "device"])
@pytest.mark.parametrize(
    ("name", "optim"), [("untied", "exact"), ("tied", "unclipped"), ("experts", "lagged"), ("opt", "int8")]
)
def test_budgets_from_too_small_to_large_are_refused_or_taken_by_both(forecaster, name, optim, tier):
    config = settings(MODELS[name], train__batch_size=6, **OPTIMS[optim])
    config.memory.host_budget = config.memory.device_budget = "8GiB"
    need = forecast_plan(forecaster, config)[0].num_bytes(tier)
    answers = []
    for budget in (need // 2, need - need // 20, need - 1, need):
        setattr(config.memory, f"{tier}_budget", f"{budget}B")
        (plan, rows), (forecast, forecast_rows) = engine_plan(config), forecast_plan(forecaster, config)
        assert type(plan) is type(forecast), f"{budget} of {need}: {plan} but {forecast}"
        assert rows == forecast_rows
        if isinstance(plan, BudgetError):
            assert (str(plan), plan.needed, plan.limit) == (str(forecast), forecast.needed, budget)
        else:
            assert lines(plan) == lines(forecast)
        answers.append(rows is not None)
    assert not answers[0] and answers[-1]


WIDE = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
        "max_position_embeddings": 256}  # fmt: skip
GATED = WIDE | {"intermediate_size": 688, "num_key_value_heads": 4}
WIDE_MODELS = {
    "llama": GATED,
    "qwen2": GATED,
    "mixtral": GATED | {"num_local_experts": 4},
    "opt": WIDE | {"ffn_dim": 1024, "word_embed_proj_dim": 256, "dropout": 0.0},
}


@pytest.mark.parametrize(("recompute", "kept"), [("selective", "linear outputs"), ("none", "graphs")])
@pytest.mark.parametrize("family", WIDE_MODELS)
def test_what_layers_keep_is_near_what_an_engine_measures(forecaster, family, recompute, kept):
    config = settings({"model_type": family} | WIDE_MODELS[family], memory__recompute=Recompute(recompute))
    config.memory.host_budget = config.memory.device_budget = "8GiB"
    sizes = []
    for plan, _ in (engine_plan(config), forecast_plan(forecaster, config)):
        sizes += [size for _, purpose, size in lines(plan) if purpose == f"{kept} of 2 blocks"]
    measured, estimated = sizes
    assert estimated == (measured if recompute == "selective" else pytest.approx(measured, rel=0.1))
