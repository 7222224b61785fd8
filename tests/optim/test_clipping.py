import pytest
import torch

from horizon.config.schema import Clip, OnNonFinite
from horizon.errors import ConfigError, NonFiniteError
from horizon.optim.adamw import AdamW
from horizon.optim.clipping import Clipping, clip_scale, global_norm


@pytest.mark.parametrize("max_norm", [1e-3, 0.3, 1.0, 7.7, 1e4])
@pytest.mark.parametrize("seed", range(5))
def test_norm_and_clipped_gradients_equal_torchs_bit_for_bit(seed, max_norm):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.zeros(17, 1 + index)) for index in range(150)]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 10.0**-seed
    grads = [param.grad.clone() for param in params]
    norm = global_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
    assert norm.dtype == torch.float32
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(params, max_norm))
    scale = clip_scale(norm, max_norm)
    for param, grad in zip(params, grads, strict=True):
        assert torch.equal(grad * scale, param.grad)
    assert (scale == 1.0) == (float(norm) < max_norm)


def test_without_a_maximum_nothing_is_read_or_scaled():
    assert clip_scale(torch.tensor(float("nan"), device="meta"), None) == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_refused(value):
    with pytest.raises(NonFiniteError, match=f"the gradient norm is {value}"):
        clip_scale(torch.tensor(value), 1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_maximum_that_is_not_positive_is_refused(value):
    with pytest.raises(ConfigError, match=r"max_grad_norm must be > 0.*optim\.max_grad_norm"):
        Clipping(value)


def test_a_positive_maximum_or_none_passes():
    assert not Clipping(None).keeps_gradients
    assert Clipping(1.0).keeps_gradients


@pytest.mark.parametrize("mode", [Clip.speculative, Clip.lagged])
def test_a_mode_needs_a_norm_to_clip_to(mode):
    message = (
        rf"clip={mode} has no norm to clip to, as max_grad_norm is null; set optim\.max_grad_norm.*optim\.clip=exact"
    )
    with pytest.raises(ConfigError, match=message):
        Clipping(None, mode)
    Clipping(1.0, mode).check(AdamW(), OnNonFinite.stop)


def test_lagged_steps_cannot_be_dropped():
    with pytest.raises(
        ConfigError, match=r"clip=lagged.*on_nonfinite=skip cannot drop.*optim\.clip.*train\.on_nonfinite"
    ):
        Clipping(1.0, Clip.lagged).check(AdamW(), OnNonFinite.skip)
    for mode in (Clip.exact, Clip.speculative):
        Clipping(1.0, mode).check(AdamW(), OnNonFinite.skip)


def test_betas_under_which_steps_have_no_longest_are_refused():
    betas = (0.99, 0.95)
    with pytest.raises(ConfigError, match=r"beta1\^2 < beta2, got betas \(0\.99, 0\.95\); set optim\.beta1"):
        Clipping(1.0, Clip.speculative).check(AdamW(betas=betas), OnNonFinite.stop)
    Clipping(1.0, Clip.lagged).check(AdamW(betas=betas), OnNonFinite.stop)


def test_what_a_report_says():
    notes = [Clipping(None).note, Clipping(1.0).note, *(Clipping(1.0, m).note for m in (Clip.speculative, Clip.lagged))]
    assert notes == ["none", "exact", "speculative", "lagged clipping: not exact"]


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_only_float32_moments_can_be_taken_back(moments):
    adamw = AdamW(moments=moments)
    with pytest.raises(ConfigError, match=rf"clip=speculative .*{moments}; set optim.moments=float32, or optim.clip="):
        Clipping(1.0, Clip.speculative).check(adamw, OnNonFinite.stop)
    Clipping(1.0, Clip.speculative).check(AdamW(), OnNonFinite.stop)
    for mode in (Clip.exact, Clip.lagged):
        Clipping(1.0, mode).check(adamw, OnNonFinite.stop)
