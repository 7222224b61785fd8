"""The same executor on CUDA: equal to a resident model, and to itself however it is arranged."""

import pytest
import torch

import horizon
from horizon.models.kernels import liger_available
from tests.gpu.models import (
    EAGER,
    FAMILIES,
    assert_close,
    batches,
    build,
    differing,
    engine,
    gradients,
    padded,
    plain_gradients,
    resident,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [batches, lambda: batches(3), padded], ids=["one", "three", "padded"])
def test_fp32_gradients_are_a_resident_models_by_name(family, make):
    model, step = build(family), make()
    expected_loss, expected = plain_gradients(resident(model), step)
    with engine(model, compute_dtype="float32") as streamed:
        result = streamed.step(step)
        found = dict(streamed.named_gradients())
    assert result.loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close(found, expected, 2e-5)


@pytest.mark.parametrize("family", ["llama, tied", "qwen3", "gpt2"])
def test_bf16_gradients_are_near_a_resident_bf16_models(family):
    model, step = build(family), batches()
    expected_loss, expected = plain_gradients(resident(model, torch.bfloat16), step)
    with engine(model, compute_dtype="bfloat16") as streamed:
        result = streamed.step(step)
        found = dict(streamed.named_gradients())
    assert result.loss == pytest.approx(expected_loss, rel=1e-2)
    assert_close(found, expected, 5e-2)


@pytest.mark.skipif(not liger_available(), reason="needs liger-kernel")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 1e-1)])
@pytest.mark.parametrize("family", ["llama, tied", "qwen3"])
def test_ligers_kernels_give_the_gradients_of_torchs(family, dtype, tolerance):
    model, step, found = build(family), batches(), {}
    for kernels in ("torch", "liger"):
        with engine(model, kernels=kernels, compute_dtype=dtype) as streamed:
            found[kernels] = gradients(streamed, step)
    assert_close(found["liger"], found["torch"], tolerance)
    assert differing(found["liger"], found["torch"])  # else the kernels were not exchanged


def train(model, steps=3, memory=None, **settings):
    """Weights by name after some steps."""
    with engine(model, memory=memory or horizon.MemoryConfig(), **settings) as streamed:
        for step in range(steps):
            streamed.step(batches(2, seed=step))
        return dict(streamed.named_master_parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_updates_inside_the_backward_give_the_weights_of_updates_after_it(dtype):
    model = build("llama, tied", **EAGER)
    streamed = train(model, max_grad_norm=None, compute_dtype=dtype)
    kept = train(model, max_grad_norm=1e30, compute_dtype=dtype)
    assert differing(streamed, kept) == []
    assert differing(kept, dict(model.named_parameters()))  # it did train


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_number_of_slots_changes_no_bit(dtype):
    model = build("llama, tied", **EAGER)
    one, two, three = (
        train(model, compute_dtype=dtype, memory=horizon.MemoryConfig(weight_slots=n)) for n in (1, 2, 3)
    )
    assert differing(one, two) == differing(three, two) == []


@pytest.mark.parametrize("clip", ["exact", "speculative"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_layers_at_the_turn_change_no_bit(dtype, clip):
    model = build("llama, tied", **EAGER)
    plain, one, all_of_them = (
        train(model, compute_dtype=dtype, clip=clip, memory=horizon.MemoryConfig(turn_layers=n, recompute="none"))
        for n in (0, 1, model.config.num_hidden_layers)
    )
    assert differing(one, plain) == differing(all_of_them, plain) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_boundaries_by_way_of_the_host_change_no_bit(dtype, offload_everything):
    model = build("llama, tied", **EAGER)
    kept = train(model, compute_dtype=dtype)
    offload_everything()
    assert differing(train(model, compute_dtype=dtype), kept) == []


def test_accumulating_adds_up_to_the_gradients_of_one_step():
    model, step = build("llama, tied"), batches(4)
    with engine(model, compute_dtype="float32") as streamed:
        together = gradients(streamed, step)
    with engine(model, compute_dtype="float32") as streamed:
        for batch in step:
            streamed.forward_backward(batch)
        assert_close(dict(streamed.named_gradients()), together, 2e-5)
