"""The least bytes of a step are what the executor moves where nothing forces more."""

import pytest
import torch

from horizon.plan.memory import MemoryNeeds
from horizon.plan.traffic import least_traffic
from tests.stream.simulated import Durations, simulate
from tests.stream.steps import tiny_model


def needs(model, weight_slots, dtype=torch.bfloat16, grad_dtype=torch.bfloat16, in_hbm=frozenset(), turn_layers=0):
    return MemoryNeeds(model.layouts, dtype, grad_dtype, True, weight_slots, 0, 0, in_hbm, turn_layers=turn_layers)


def moved(model, weight_slots, in_hbm=frozenset(), turn_layers=0):
    """Bytes by (direction, what) of a step."""
    step, _ = simulate(
        model, Durations(), weight_slots=weight_slots, in_hbm=in_hbm, num_micro_batches=2, turn_layers=turn_layers
    )
    found = {("H2D", "weights"): 0, ("D2H", "gradient"): 0}
    for span in (*step.lane("H2D"), *step.lane("D2H")):
        found[span.lane, span.what] = found.get((span.lane, span.what), 0) + span.num_bytes
    return found


FROZEN = ("model.embed_tokens.*", "model.layers.0.*")


@pytest.mark.parametrize("weight_slots", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("freeze", [(), FROZEN], ids=["all", "frozen"])
def test_an_untied_models_step_moves_the_least(weight_slots, freeze):
    model = tiny_model(layers=3, freeze=freeze)
    assert moved(model, weight_slots) == least_traffic(needs(model, weight_slots))


@pytest.mark.parametrize("weight_slots", [2, 3])
@pytest.mark.parametrize("turn_layers", [1, 2, 3])
@pytest.mark.parametrize("in_hbm", [frozenset(), frozenset({0, 2})], ids=["streamed", "some in HBM"])
def test_layers_at_the_turn_go_up_once(weight_slots, turn_layers, in_hbm):
    model = tiny_model(layers=3)
    expected = least_traffic(needs(model, weight_slots, in_hbm=in_hbm, turn_layers=turn_layers))
    assert moved(model, weight_slots, in_hbm, turn_layers) == expected


@pytest.mark.parametrize("weight_slots", [2, 3])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("in_hbm", [{0}, {0, 1}, {0, 4}, {0, 1, 2, 4}, {0, 1, 2, 3, 4}], ids=str)
def test_blocks_in_hbm_move_nothing(weight_slots, tied, in_hbm):
    """Nor does a tied head that reads the embedding there."""
    model, in_hbm = tiny_model(layers=3, tied=tied), frozenset(in_hbm)
    assert moved(model, weight_slots, in_hbm) == least_traffic(needs(model, weight_slots, in_hbm=in_hbm))


def test_one_slot_moves_the_last_layer_again():
    model = tiny_model(layers=3)
    found, least = moved(model, 1), least_traffic(needs(model, 1))
    assert least == least_traffic(needs(model, 2))
    assert found["H2D", "weights"] - least["H2D", "weights"] == 2 * model.layouts[3].num_elements


def test_a_tied_head_moves_the_embeddings_gradient_twice_more():
    model = tiny_model(layers=2, tied=True)
    found, least = moved(model, 2), least_traffic(needs(model, 2))
    shared = 2 * sum(b.param.spec.numel for b in model.layouts[-1].borrowed)
    assert found["H2D", "weights"] == least["H2D", "weights"]
    assert found["D2H", "gradient"] == least["D2H", "gradient"] + shared
    assert found["H2D", "gradient"] == shared


def test_fp32_takes_both_halves_and_fp32_gradients_twice_the_bytes():
    model = tiny_model(layers=3)
    small, large = least_traffic(needs(model, 2)), least_traffic(needs(model, 2, torch.float32, torch.float32))
    assert large == {key: 2 * num_bytes for key, num_bytes in small.items()}
