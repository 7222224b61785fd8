"""Dropout: the recomputation in backward draws the masks of the forward again.

The resident model draws the same masks once, at its one forward; were they drawn anew in the recomputation, every
gradient would differ.
"""

import pytest
import torch

from horizon.stream.randomness import _mix
from tests.parity.reference import (
    Resident,
    assert_same,
    assert_same_tensors,
    build,
    engine_for,
    packed,
    padded,
    plain,
    streamed_step,
)

SEED = 3
DROPOUT = {
    "gpt2": {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
    "opt": {"dropout": 0.1, "attention_dropout": 0.1},
    "llama": {"attention_dropout": 0.2},  # in the config only: no dropout module
    "phi3": {"resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "falcon": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "gpt_neo": {"attention_dropout": 0.1, "embed_dropout": 0.1, "resid_dropout": 0.1},
    "mixtral": {"router_jitter_noise": 0.2},  # random, but not called dropout
}


def pass_seed(number):
    """The seed of the engine's pass `number` (from 1)."""
    return SEED * 1_000_003 + number


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", DROPOUT)
def test_training_with_dropout_equals_the_resident_model_with_the_same_masks(family, tied):
    model = build(family, tie_word_embeddings=tied, **DROPOUT[family])
    resident = Resident(model)
    with engine_for(model, seed=SEED) as engine:
        for number in range(1, 4):
            batches = [padded(number, [12, 7]), plain(number + 10)]
            torch.manual_seed(number)  # what else is drawn in the process has no influence
            assert_same(streamed_step(engine, batches), resident.step(batches, seed=pass_seed(number)))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_masks_differ_from_pass_to_pass_and_are_off_in_evaluation(family):
    batch, still = plain(0), build(family)
    with engine_for(still) as engine:
        expected = engine.evaluate(batch)
    with engine_for(build(family, **DROPOUT[family])) as engine:
        assert engine.evaluate(batch) == expected
        losses = {engine.forward_backward(batch) for _ in range(3)}
        assert len(losses | {expected}) == 4
        assert engine.evaluate(batch) == expected


def test_the_global_generator_is_left_alone():
    with engine_for(build("gpt2", **DROPOUT["gpt2"])) as engine:
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        engine.step([packed(0, [[5, 7]]), plain(1)])
        assert torch.equal(torch.rand(3), expected)


def test_another_seed_draws_other_masks_and_the_same_seed_the_same():
    gradients = []
    for seed in (1, 1, 2):
        with engine_for(build("gpt2", **DROPOUT["gpt2"]), seed=seed) as engine:
            engine.step(plain(0))
            gradients.append(dict(engine.named_gradients()))
    assert_same_tensors(gradients[0], gradients[1])
    assert not any(torch.equal(g, gradients[2][name]) for name, g in gradients[0].items())


def test_no_two_of_a_runs_masks_share_a_seed():
    passes = [seed * 1_000_003 + number for seed in range(3) for number in range(1, 20)]
    seeds = [_mix(number, block, m) for number in passes for block in range(30) for m in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
