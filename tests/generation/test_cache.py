"""Placed layers answer as transformers' own, whatever the passes' lengths and wherever their memory is."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from horizon.generation.cache import allocated, shape_of

ROWS, HEADS, KEY, VALUE = 2, 3, 4, 5
CPU = torch.device("cpu")


def states(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(ROWS, HEADS, tokens, dim, generator=generator) for dim in (KEY, VALUE))


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    windows=st.lists(st.none() | st.integers(2, 8), min_size=1, max_size=3),
    on_device=st.sets(st.integers(0, 2)),
)
def test_placed_layers_give_what_transformers_layers_give(lengths, windows, on_device):
    def reference():
        return [DynamicLayer() if w is None else DynamicSlidingWindowLayer(w) for w in windows]

    probed = reference()
    for layer in probed:
        layer.update(*states(2, 0))
    shapes = [shape_of(layer, "model") for layer in probed]
    assert [shape.cache.token_bytes for shape in shapes] == [HEADS * (KEY + VALUE) * 4] * len(windows)
    own = DynamicCache()
    own.layers, own.layer_class_to_replicate = reference(), None
    with allocated(shapes, ROWS, sum(lengths), on_device, CPU) as cache:
        for turn, length in enumerate(lengths):
            for i in range(len(windows)):  # layer after layer: those on the host share what the device sees of them
                assert cache.get_mask_sizes(length, i) == own.get_mask_sizes(length, i)
                new = states(length, 100 * turn + i)
                found, wanted = cache.update(*new, i), own.update(*new, i)
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
                assert cache.get_seq_length(i) == own.get_seq_length(i)
        assert not cache.is_compileable
        assert cache.is_sliding == own.is_sliding
