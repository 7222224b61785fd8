"""Frozen parameters never move and have no gradient; what is left trains as in the resident model.

Also parameters that are trained but take no part: experts that no token was sent to, and a parameter nobody reads.
"""

import fnmatch

import pytest
import torch

from tests.parity.reference import (
    LR,
    Resident,
    assert_same,
    assert_trains_the_same,
    build,
    engine_for,
    padded,
    plain,
    streamed_step,
)

DEPTH = 4
PATTERNS = {
    "embedding": ["model.embed_tokens.*"],
    "all but the last layer": ["model.embed_tokens.*", "model.layers.[012].*", "model.norm.*", "lm_head.*"],
    "all but the head": ["model.embed_tokens.*", "model.layers.*"],
    "all but the embedding": ["model.layers.*", "model.norm.*", "lm_head.*"],
    "a middle layer": ["model.layers.2.*"],
    "norms": ["*norm*"],
    "first layers": ["model.embed_tokens.*", "model.layers.[01].*"],
    "mlp of one layer, attention of another": ["model.layers.0.mlp.*", "model.layers.3.self_attn.*"],
    "all but one matrix": ["*embed*", "*norm*", "lm_head*", "*self_attn*", "*gate*", "*up*", "*layers.[013]*down*"],
}


def steps():
    return [[padded(seed, [12, 7]), plain(seed + 10)] for seed in range(3)]


def check_frozen(model, outcomes, frozen):
    before = {name: p.detach() for name, p in model.named_parameters()}
    assert frozen and len(frozen) < len(before)
    for outcome in outcomes:
        assert list(outcome.gradients) == [name for name in before if name not in frozen]
        assert all(torch.equal(outcome.weights[name], before[name]) for name in frozen)
        assert all(not torch.equal(outcome.weights[name], before[name]) for name in outcome.gradients)


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
def test_frozen_on_the_model(patterns):
    model = build("llama", num_hidden_layers=DEPTH)
    frozen = {name for pattern in patterns for name in fnmatch.filter(dict(model.named_parameters()), pattern)}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    check_frozen(model, assert_trains_the_same(model, steps()), frozen)


@pytest.mark.parametrize("what", ["embedding", "a middle layer", "norms"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_frozen_by_pattern_with_tied_embeddings(family, what):
    model = build(family, num_hidden_layers=DEPTH, tie_word_embeddings=True, **LAYER_TYPES.get(family, {}))
    twin = build(family, num_hidden_layers=DEPTH, tie_word_embeddings=True, **LAYER_TYPES.get(family, {}))
    frozen = set()
    for pattern in PATTERNS[what]:
        frozen.update(fnmatch.filter(dict(model.named_parameters()), pattern))
    for name in frozen:
        twin.get_parameter(name).requires_grad_(False)
    resident, outcomes = Resident(twin), []
    with engine_for(model, freeze=PATTERNS[what]) as engine:
        for batches in steps():
            outcomes.append(streamed_step(engine, batches))
            assert_same(outcomes[-1], resident.step(batches))
    check_frozen(model, outcomes, frozen)


LAYER_TYPES = {"gemma2": {"layer_types": ["sliding_attention", "full_attention"] * 2}}


def test_a_frozen_engine_without_clipping_publishes_its_frozen_blocks_too():
    """Gradients stream through the ring; blocks with nothing to train take part in no update."""
    model = build("llama", num_hidden_layers=DEPTH)
    patterns = PATTERNS["mlp of one layer, attention of another"] + PATTERNS["a middle layer"]
    results = []
    for clip in (None, 1e9):
        with engine_for(model, freeze=patterns, max_grad_norm=clip) as engine:
            losses = [engine.step(batches).loss for batches in steps()]
            results.append((losses, dict(engine.named_master_parameters())))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], weight) for name, weight in results[1][1].items())


# ---- trained, but without a gradient


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_that_no_token_reached_only_decay(family):
    count = {"mixtral": "num_local_experts", "gpt_oss": "num_local_experts", "qwen3_moe": "num_experts"}
    model = build(family, **{count.get(family, "n_routed_experts"): 16})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    outcome = assert_trains_the_same(model, [[plain(0, rows=1, tokens=3)]])[0]
    experts = [name for name in before if ".experts." in name and before[name].dim() == 3]
    assert len(experts) >= 2
    for name in experts:
        gradient = outcome.gradients[name].flatten(1)
        unrouted = (gradient == 0).all(dim=1)
        assert 4 <= int(unrouted.sum()) <= 14, name  # some were reached, some not
        decayed = before[name] * (1 - LR * 0.01)
        assert torch.equal(outcome.weights[name][unrouted], decayed[unrouted]), name
        assert (outcome.weights[name][~unrouted] != decayed[~unrouted]).any()


def test_a_parameter_that_nobody_reads_has_a_gradient_of_zero_and_shifts_nobody():
    """Torch's optimizer passes over a parameter whose grad is None; here, as with any flat gradient, it is zero."""
    model = build("llama")
    layer = model.model.layers[0]
    layer.self_attn.spare = torch.nn.Parameter(torch.full((5, 16), 0.5))
    layer.spare = torch.nn.Parameter(torch.full((16,), 0.25))
    names = ("model.layers.0.self_attn.spare", "model.layers.0.spare")
    resident = Resident(model)
    for name in names:
        resident.named[name].grad = torch.zeros_like(resident.named[name])
    with engine_for(model) as engine:
        found = streamed_step(engine, [plain(0), plain(1)])
    assert_same(found, resident.step([plain(0), plain(1)]))
    matrix, vector = (found.weights[name] for name in names)
    torch.testing.assert_close(matrix, torch.full((5, 16), 0.5 * (1 - LR * 0.01)))
    assert torch.equal(vector, torch.full((16,), 0.25))
