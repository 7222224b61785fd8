"""The plan puts layers at the turn where that pays, and keeps to what was asked for."""

from dataclasses import replace

import pytest

from horizon.config.compose import load_machine
from horizon.config.schema import Clip, MemoryConfig, Recompute
from horizon.forecast.outlook import look
from tests.forecast.conftest import settings

WIDE = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture
def forecast(forecaster):
    def run(batch_size=64, clip=Clip.speculative, **memory):
        config = settings(WIDE, train__batch_size=batch_size, train__seq_len=1024, optim__clip=clip)
        config.memory = MemoryConfig(device_budget="48GiB", **memory)
        return forecaster(config, load_machine("h200")).forecast(config)

    return run


@pytest.mark.parametrize("clip", [Clip.speculative, Clip.exact])
def test_spare_memory_goes_to_layers_at_the_turn_where_that_is_fastest(forecast, clip):
    turned, plain = forecast(clip=clip), forecast(clip=clip, turn_layers=0)
    assert turned.needs.turn_layers > 0
    assert turned.prediction.seconds < 0.98 * plain.prediction.seconds
    assert turned.layers_that(Recompute.none) >= turned.needs.turn_layers
    assert turned.plan.num_bytes("device") <= turned.plan.limits.device
    assert any(line.purpose == f"graphs of {turned.needs.turn_layers} turn layers" for line in turned.plan.activations)


def test_a_number_that_is_asked_for_is_kept(forecast):
    for num in (0, 3):
        assert forecast(turn_layers=num).needs.turn_layers == num


def test_one_micro_batch_or_layers_that_are_run_again_have_no_turn(forecast):
    assert forecast(batch_size=1).needs.turn_layers == 0
    assert forecast(recompute=Recompute.full).needs.turn_layers == 0


def test_only_layers_that_keep_their_graph_are_at_the_turn(forecast):
    found = forecast(turn_layers=4, recompute=Recompute.full)
    assert found.activations.recompute == dict.fromkeys(range(13, 17), Recompute.none)
    less = replace(found.needs, turn_layers=0)
    assert [*less.turn] == [] and [*found.needs.turn] == [13, 14, 15, 16]


def test_too_many_layers_are_refused_and_the_plan_may_choose_instead(forecaster):
    config = settings(WIDE, train__batch_size=64, train__seq_len=1024)
    config.memory = MemoryConfig(device_budget="16GiB", turn_layers=16)
    outlook = look(forecaster(config, load_machine("h200")), config)
    assert outlook.forecast is None and outlook.refusal.tier == "device"
    assert "weights, sums of 16 turn layers" in str(outlook.refusal)
    assert outlook.alternatives[0].change == {"memory.turn_layers": None}
