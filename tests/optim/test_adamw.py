import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

import horizon.optim.updater as updater_module
from horizon.config.schema import Moments
from horizon.errors import ConfigError, NonFiniteError
from horizon.optim.adamw import AdamW, step_scalars, update_torch
from horizon.optim.kernel import compile_kernel, update_numba
from horizon.optim.states import UpdateStates, update_order
from horizon.store.split import join_master, split_master

# where torch fuses multiply-adds is up to its build; ours stand where its AVX-512 build has them
BIT_EQUAL = torch.backends.cpu.get_cpu_capability() == "AVX512"
LENGTH = 16 * 2053  # a multiple of 16 (torch's tail differs from torch's body) but more than one torch piece
STEPS = 12


def ulps(got, expected):
    """Largest distance in representable float32 values between two tensors."""

    def ordered(values):
        bits = values.contiguous().view(torch.int32).to(torch.int64)
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return int((ordered(got) - ordered(expected)).abs().max())


class Run:
    """The same parameters and gradients trained by torch's fused AdamW and by one of our updates."""

    def __init__(self, update, grad_bits, adamw, decay=True, length=LENGTH):
        self.generator = torch.Generator().manual_seed(0)
        self.update, self.grad_bits, self.adamw, self.decay = update, grad_bits, adamw, decay
        start = torch.randn(length, generator=self.generator) * 0.02
        self.param = torch.nn.Parameter(start.clone())
        self.torch = torch.optim.AdamW(
            [self.param],
            lr=adamw.lr,
            betas=adamw.betas,
            eps=adamw.eps,
            weight_decay=adamw.weight_decay if decay else 0.0,
            fused=True,
        )
        hi, lo = split_master(start)
        self.weights = hi.view(torch.int16).numpy().view(np.uint16)
        self.residual = lo.numpy().view(np.uint16)
        self.exp_avg, self.exp_avg_sq = np.zeros(length, np.float32), np.zeros(length, np.float32)

    def step(self, step, lr, max_norm=None):
        size = 10.0 ** torch.randint(-6, 2, self.param.shape, generator=self.generator)
        grad = torch.randn(self.param.shape, generator=self.generator) * size
        grad[::7] = 0
        grads = grad.numpy().copy()
        if self.grad_bits:
            grads = grad.bfloat16().view(torch.int16).numpy().view(np.uint16)
            grad = grad.bfloat16().float()
        self.param.grad = grad
        scale = 1.0
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_([self.param], max_norm)
            scale = float((max_norm / (norm + 1e-6)).clamp(max=1.0))
        self.torch.param_groups[0]["lr"] = lr
        self.torch.step()
        scalars = step_scalars(self.adamw, lr, step, scale, self.decay)
        self.update(self.weights, self.residual, self.exp_avg, self.exp_avg_sq, grads, scalars)

    def master(self):
        return join_master(*(torch.from_numpy(a.view(np.int16)) for a in (self.weights, self.residual)))

    def distances(self):
        """Largest distance of (p, m, v) from torch's: m and v in their ulps, p in ulps of max(|p|, lr).

        A parameter that crosses zero is the difference of larger numbers; its own ulp would say nothing.
        """
        expected = self.param.detach()
        unit = torch.finfo(torch.float32).eps * expected.abs().clamp(min=self.adamw.lr)
        state = self.torch.state[self.param]
        return (
            float(((self.master() - expected).abs() / unit).max()),
            ulps(torch.from_numpy(self.exp_avg), state["exp_avg"]),
            ulps(torch.from_numpy(self.exp_avg_sq), state["exp_avg_sq"]),
        )


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("grad_bits", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("update", [update_numba, update_torch])
def test_update_equals_torch_fused(update, grad_bits, beta2, decay, max_norm):
    run = Run(update, grad_bits, AdamW(lr=1e-3, betas=(0.9, beta2), weight_decay=0.1), decay)
    for step in range(1, STEPS + 1):
        run.step(step, lr=1e-3 * step / STEPS, max_norm=max_norm)
        assert max(run.distances()) <= (0 if BIT_EQUAL else 2), f"step {step}: {run.distances()}"


@pytest.mark.parametrize("lr", [1e-5, 1e-6])
def test_masters_move_where_bf16_weights_stand_still(lr):
    run = Run(update_numba, False, AdamW(lr=lr, weight_decay=0.0))
    plain = run.param.detach().bfloat16()
    start = run.param.detach().clone()
    for step in range(1, 4):
        run.step(step, lr)
        plain -= torch.sign(run.param.grad).bfloat16() * lr
    moved = run.master() != start
    large = start.abs() > 1e-3
    trained = run.param.grad != 0
    assert moved[large & trained].float().mean() > 0.9
    assert (plain == start.bfloat16())[start.abs() > 0.02].all()


@pytest.mark.parametrize("update", [update_numba, update_torch])
def test_zero_states_with_zero_gradients_stay_zero(update):
    arrays = [np.zeros(64, kind) for kind in (np.uint16, np.uint16, np.float32, np.float32, np.uint16)]
    for step in (1, 2):
        update(*arrays, step_scalars(AdamW(lr=0.1, eps=1e-30), 0.1, step, 1.0, True))
    assert not any(array.view(np.uint8).any() for array in arrays)


def test_kernel_is_vectorised_with_fused_multiply_adds():
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the instruction names are those of x86")
    for assembly in compile_kernel(cache=False).inspect_asm().values():
        packed = [line for line in assembly.splitlines() if "ymm" in line or "zmm" in line]
        for instruction in ("vfmadd", "vdivps", "vsqrtps"):
            assert any(instruction in line for line in packed), f"no packed {instruction}"


def test_kernel_refuses_other_types():
    arrays = [np.zeros(64, kind) for kind in (np.uint16, np.uint16, np.float64, np.float32, np.uint16)]
    with pytest.raises(TypeError):
        update_numba(*arrays, step_scalars(AdamW(), 1e-5, 1, 1.0, True))


def test_scalars_are_rounded_once():
    scalars = step_scalars(AdamW(betas=(0.9, 0.95), weight_decay=0.1), 3e-4, 7, 0.25, True)
    exact = (0.95, 1 - 0.9, 1 - 0.95, 1e-8, 1 - 3e-4 * 0.1, -3e-4 / (1 - 0.9**7), (1 - 0.95**7) ** 0.5, 0.25)
    assert scalars == tuple(np.float32(value) for value in exact)
    assert all(isinstance(value, np.float32) for value in scalars)
    assert step_scalars(AdamW(weight_decay=0.1), 3e-4, 7, 1.0, False).decay == 1


@pytest.mark.parametrize("lr, scale", [(float("nan"), 1.0), (1e-5, float("nan")), (1e-5, float("inf"))])
def test_scalars_that_would_destroy_the_weights_are_refused(lr, scale):
    with pytest.raises(NonFiniteError, match="step 3 has"):
        step_scalars(AdamW(), lr, 3, scale, True)


@pytest.mark.parametrize(
    "settings, key",
    [
        ({"lr": -1.0}, "optim.lr"),
        ({"lr": float("nan")}, "optim.lr"),
        ({"betas": (1.0, 0.9)}, "optim.beta1"),
        ({"betas": (0.9, -0.1)}, "optim.beta2"),
        ({"eps": 0.0}, "optim.eps"),
        ({"eps": 1e-60}, "optim.eps"),
        ({"weight_decay": -0.1}, "optim.weight_decay"),
    ],
)
def test_bad_settings_are_named(settings, key):
    with pytest.raises(ConfigError, match=key):
        AdamW(**settings)


def test_states_of_a_wrong_kind_or_length_are_named():
    def states(**changed):
        kinds = dict(weights="u2", residual="u2", exp_avg="f4", exp_avg_sq="f4", grads="u2")
        return UpdateStates(**{name: np.zeros(64, kind) for name, kind in kinds.items()} | changed)

    order = update_order(Moments.float32)
    states().check(64, order)
    states(grads=np.zeros(64, np.float32)).check(64, order)
    states(residual=np.zeros(0, np.uint16)).check(64, order, elsewhere=["residual"])
    for name, array in [
        ("residual", np.zeros(63, np.uint16)),
        ("exp_avg", np.zeros(64, np.float64)),
        ("exp_avg_sq", np.zeros(128, np.float32)[::2]),
        ("weights", np.zeros((8, 8), np.uint16)),
    ]:
        with pytest.raises(RuntimeError, match=f"state {name} is"):
            states(**{name: array}).check(64, order)


def test_without_numba_the_torch_path_is_used_and_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "horizon.optim.kernel")
    with caplog.at_level(logging.WARNING):
        assert updater_module.load_update() is update_torch
    assert [r.levelname for r in caplog.records] == ["WARNING"] and "numba is not available" in caplog.text


def test_importing_the_package_leaves_numba_alone():
    code = "import sys, horizon.optim; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
