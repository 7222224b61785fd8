"""What is kept from forward to backward, and what is run again, never changes a bit."""

from fnmatch import fnmatch

import pytest

from horizon import MemoryConfig
from tests.parity.reference import FAMILIES, assert_trains_the_same, build, packed, padded, plain

KEEPING = pytest.mark.parametrize("recompute", ["selective", "none"])


def ragged(seed):
    return [padded(seed, [12, 7]), padded(seed + 10, [3, 6, 4], tokens=6)]


@KEEPING
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, recompute):
    memory = MemoryConfig(recompute=recompute)
    assert_trains_the_same(build(family), [ragged(seed) for seed in range(2)], memory=memory)


@KEEPING
@pytest.mark.parametrize("slots", [1, 3])
def test_with_few_slots_and_tied_embeddings(recompute, slots):
    """A kept graph finds its weights in whatever slot the block is loaded into the second time."""
    model = build("llama", num_hidden_layers=5, tie_word_embeddings=True)
    memory = MemoryConfig(recompute=recompute, weight_slots=slots)
    assert_trains_the_same(model, [[plain(seed)] for seed in range(3)], memory=memory)


@KEEPING
def test_packed_rows_and_frozen_layers(recompute):
    steps = [[packed(seed, [[5, 3, 4], [2, 9, 1]])] for seed in range(2)]
    model, memory = build("qwen3", num_hidden_layers=4), MemoryConfig(recompute=recompute)
    assert_trains_the_same(model, steps, memory=memory)
    frozen = ["model.embed_tokens.*", "model.layers.[01].*"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(fnmatch(name, pattern) for pattern in frozen))
    assert_trains_the_same(model, steps, memory=memory, freeze=frozen)
