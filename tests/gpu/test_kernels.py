"""Kernels and passes of our own on a GPU: against fp32 references, by value."""

import pytest
import torch
from torch.nn import functional as F

import horizon
from horizon.models.kernels import liger_available
from tests.gpu.models import FAMILIES, assert_close, batches, build, engine, gradients

pytestmark = pytest.mark.gpu
IGNORED = -100


@pytest.mark.parametrize("vocab", [1, 97, 4096, 4097, 32000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_cross_entropy_is_torchs(vocab, dtype):
    from horizon.stream.cross_entropy import fused_cross_entropy

    generator = torch.Generator(device="cuda").manual_seed(0)
    logits = (5 * torch.randn(33, vocab, device="cuda", generator=generator)).to(dtype)
    logits[:, vocab // 2 + 1 :: 7] = -torch.inf
    targets = torch.full((33,), vocab // 2, device="cuda")
    targets[::5] = IGNORED
    leaf = logits.double().requires_grad_()
    expected = F.cross_entropy(leaf, targets, ignore_index=IGNORED, reduction="sum") / 7
    expected.backward()
    loss, gradient = fused_cross_entropy(logits, targets, 1 / 7, IGNORED)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, leaf.grad.to(dtype), rtol=1e-5 if dtype is torch.float32 else 8e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_logit_makes_a_bad_loss(bad):
    from horizon.stream.cross_entropy import fused_cross_entropy

    logits = torch.zeros(2, 5000, device="cuda")
    logits[1, 4999] = bad
    loss, _ = fused_cross_entropy(logits, torch.zeros(2, dtype=torch.long, device="cuda"), 1.0, IGNORED)
    assert not loss.isfinite()


@pytest.mark.skipif(not liger_available(), reason="needs liger-kernel")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", ["torch", "liger"])
@pytest.mark.parametrize("recompute", ["selective", "none"])
def test_keeping_changes_no_gradient_beyond_rounding(family, kernels, recompute):
    """Fused kernels overwrite some of what is kept: their gradients must not."""
    model, step = build(family), batches(2)
    found = {}
    for kind in ("full", recompute):
        memory = horizon.MemoryConfig(recompute=kind)
        with engine(model, compute_dtype="float32", kernels=kernels, memory=memory) as streamed:
            found[kind] = [gradients(streamed, step) for _ in range(2)]
    for kept, full in zip(found[recompute], found["full"], strict=True):
        assert_close(kept, full, 1e-5)


def test_gradients_of_many_micro_batches_are_summed_in_fp32():
    """In bf16, a sum of 64 equal gradients would stop growing long before the last."""
    model, step = build("llama"), batches(1, rows=1) * 64
    with engine(model, compute_dtype="bfloat16") as streamed:
        once, often = gradients(streamed, step[:1]), gradients(streamed, step)
    assert_close(often, once, 1e-2)
