"""Moments in 16 and 8 bits: what is written, what is read back, and what the rounding does over many steps."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types

from horizon.config.schema import Moments
from horizon.errors import ConfigError
from horizon.optim.adamw import AdamW, step_scalars, update_torch
from horizon.optim.moments import noise, random_bits, read_m, read_v, write_m, write_v
from horizon.optim.narrow import compile_kernel, narrow_update
from horizon.optim.states import update_order
from horizon.optim.updater import TORCH_UPDATES
from horizon.store.split import join_master, split_master

NARROW = [Moments.bfloat16, Moments.int8]
KINDS = {torch.bfloat16: np.uint16, torch.int16: np.uint16, torch.uint8: np.uint8, torch.float32: np.float32}
GROUP = 64
# how far a code is from the next one: relative to the value, and to the largest of the group
M_STEP, V_STEP = (1 / 16, 1 / 16 / 247), (1 / 32, 1 / 32 / 251)


def bf16(values):
    """The upper halves of float32 values, as gradients are kept."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


class States:
    """The arrays of one chunk that begins at `first` of block 3, as an update takes them."""

    def __init__(self, moments, length, grad_bits=False, seed=0, first=0):
        self.generator = np.random.default_rng(seed)
        self.moments, self.length, self.grad_bits, self.first = moments, length, grad_bits, first
        self.named = {
            state.name: np.zeros(state.span(0, length).stop, KINDS[state.dtype]) for state in update_order(moments)
        }
        hi, lo = split_master(torch.from_numpy(self.draw() * np.float32(0.02)))
        self.named["weights"], self.named["residual"] = (x.view(torch.uint16).numpy() for x in (hi, lo))

    def draw(self, spread=6):
        """Gradients over some orders of magnitude, a seventh of them zero."""
        size = 10.0 ** self.generator.integers(-spread, 1, self.length)
        grads = (self.generator.standard_normal(self.length) * size).astype(np.float32)
        grads[::7] = 0
        return grads

    def step(self, update, step, grads, lr=1e-3, grad_scale=0.5, adamw=None, span=slice(None)):
        grads = bf16(grads) if self.grad_bits else grads
        self.named["grads"] = grads
        start = span.start or 0
        arrays = [
            self.named[state.name][state.span(start, span.stop or self.length)] for state in update_order(self.moments)
        ]
        scalars = step_scalars(adamw or AdamW(lr=lr, weight_decay=0.1), lr, step, grad_scale, True)
        update(*arrays, scalars, noise(0, step, 3, self.first + start))

    def m_and_v(self):
        named = self.named
        if self.moments is Moments.int8:
            return (
                read_m(named["exp_avg"], named["exp_avg_scale"]),
                read_v(named["exp_avg_sq"], named["exp_avg_sq_scale"]),
            )
        return tuple((named[name].astype(np.uint32) << 16).view(np.float32) for name in ("exp_avg", "exp_avg_sq"))

    def master(self):
        halves = (torch.from_numpy(self.named[name].view(np.int16)) for name in ("weights", "residual"))
        return join_master(*halves).numpy()


def same(first, second):
    """Which arrays of two `States` differ."""
    return [name for name, array in first.named.items() if not np.array_equal(array, second.named[name])]


# ---- the kernels


@pytest.mark.parametrize("length", [1, 63, 64, 65, 640, 64 * 1500 + 37])
@pytest.mark.parametrize("grad_bits", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("moments", NARROW)
def test_the_kernel_and_plain_operations_are_bit_equal(moments, grad_bits, length):
    compiled, plain = (States(moments, length, grad_bits, first=128) for _ in range(2))
    for step in range(1, 7):
        grads = compiled.draw() if step < 6 else np.zeros(length, np.float32)
        compiled.step(narrow_update(moments), step, grads)
        plain.step(TORCH_UPDATES[moments], step, grads)
        assert same(compiled, plain) == [], f"step {step}"
    assert length < 64 or compiled.named["exp_avg"].any()


@pytest.mark.parametrize("moments", NARROW)
def test_the_master_moves_as_with_float32_moments_that_hold_the_same(moments):
    """The update itself is the one of `horizon.optim.adamw`; what differs is what is kept of the moments."""
    narrow, wide = States(moments, 6400), States(Moments.float32, 6400)
    for step in range(1, 5):
        grads = narrow.draw()
        wide.named["exp_avg"], wide.named["exp_avg_sq"] = (np.ascontiguousarray(x) for x in narrow.m_and_v())
        narrow.step(narrow_update(moments), step, grads)
        wide.step(lambda *arguments: update_torch(*arguments[:-1]), step, grads)
        assert np.array_equal(narrow.master(), wide.master()), f"step {step}"


@given(
    st.sampled_from(NARROW),
    st.integers(1, 700),
    st.lists(st.integers(1, 10), max_size=6),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_cuts_between_groups_change_nothing(moments, length, cuts, plain, seed):
    update = TORCH_UPDATES[moments] if plain else narrow_update(moments)
    whole, cut = (States(moments, length, seed=seed) for _ in range(2))
    borders = sorted({0, length, *(GROUP * c for c in np.cumsum(cuts).tolist() if GROUP * c < length)})
    for step in (1, 2, 3):
        grads = whole.draw()
        whole.step(update, step, grads)
        for start, stop in itertools.pairwise(borders):
            cut.step(update, step, grads, span=slice(start, stop))
    assert same(whole, cut) == []


@pytest.mark.parametrize("moments", NARROW)
@pytest.mark.parametrize("plain", [False, True])
def test_zero_states_with_zero_gradients_stay_zero(moments, plain):
    states = States(moments, 100)
    for name in ("weights", "residual"):
        states.named[name][:] = 0
    for step in (1, 2):
        update = TORCH_UPDATES[moments] if plain else narrow_update(moments)
        states.step(update, step, np.zeros(100, np.float32), adamw=AdamW(lr=0.1, eps=1e-30))
    assert not any(array.any() for array in states.named.values())


@pytest.mark.parametrize("moments", NARROW)
def test_the_kernel_is_vectorised(moments):
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the instruction names are those of x86")
    for assembly in compile_kernel(moments, cache=False, grads=(types.uint16,)).inspect_asm().values():
        packed = [line for line in assembly.splitlines() if "ymm" in line or "zmm" in line]
        for instruction in ("vfmadd", "vdivps", "vsqrtps", "vpmulld"):
            assert any(instruction in line for line in packed), f"no packed {instruction}"


def test_the_kernel_refuses_other_types():
    states = States(Moments.int8, 64)
    states.named["exp_avg_scale"] = states.named["exp_avg_scale"].astype(np.float64)
    with pytest.raises(TypeError):
        states.step(narrow_update(Moments.int8), 1, states.draw())


def test_an_unknown_format_is_named():
    with pytest.raises(ConfigError, match=r"optim.moments='int4': expected one of float32, bfloat16, int8"):
        AdamW(moments="int4")


# ---- the codes

FLOATS = st.floats(-(2.0**99), 2.0**99, width=32)


def a_group(values, random):
    return np.array(values, np.float32), np.full(len(values), random, np.uint32)


@given(st.lists(FLOATS, min_size=1, max_size=64), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_m_comes_back_within_a_step_with_its_sign(values, random):
    m, bits = a_group(values, random)
    codes, scales = write_m(m, bits)
    back = read_m(codes, scales)
    assert scales == np.abs(m).max()
    if scales < 2.0**-100:
        assert not back.any()
        return
    step = np.maximum(M_STEP[0] * np.abs(m), 0) + M_STEP[1] * scales
    assert (np.abs(back - m) <= 1.001 * step).all()
    assert (np.sign(back) * np.sign(m) >= 0).all() and not back[m == 0].any()
    assert np.abs(back).max() <= 1.001 * scales


@given(st.lists(FLOATS, min_size=1, max_size=64), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_v_comes_back_within_a_step_of_its_root_and_is_never_lost(values, random):
    root, bits = a_group(values, random)
    v = np.square(root.clip(-1e18, 1e18))
    codes, scales = write_v(v, bits)
    back, exact = np.sqrt(read_v(codes, scales)), np.sqrt(v)
    assert scales == exact.max()
    assert ((codes > 0) == (v > 0)).all()
    if scales > 1e-15:  # below, squares of small codes leave the range of float32
        assert (np.abs(back - exact) <= 1.001 * (V_STEP[0] * exact + V_STEP[1] * scales)).all()
        assert ((back > 0) == (v > 0)).all()


@given(st.lists(FLOATS, min_size=1, max_size=64), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_what_was_read_is_written_the_same_but_for_one_chance_in_many(values, random, other):
    m, bits = a_group(values, random)
    codes, scales = write_m(m, bits)
    back = read_m(codes, scales)
    again, _ = write_m(back, np.full(m.size, other & 0xFFFF0000 | 0x8000, np.uint32))
    largest = np.abs(back).max()
    if largest == scales:  # else the scale has moved, and all codes with it
        assert (again == codes).all()


def test_codes_are_as_fine_as_they_are_said_to_be():
    x = read_m(np.arange(256, dtype=np.uint8), np.full(4, 247, np.float32))
    assert np.array_equal(x[128:], -x[:128]) and x[0] == 0 and x[127] == pytest.approx(247)
    steps = np.diff(x[:128])
    assert steps.min() == pytest.approx(1 / 16, rel=1e-4) and (steps <= 1.001 * (1 + x[:127]) / 16).all()
    root = np.sqrt(read_v(np.arange(256, dtype=np.uint8), np.full(4, 251, np.float32)))
    steps = np.diff(root)
    assert steps.min() == pytest.approx(1 / 32, rel=1e-3) and (steps <= 1.001 * (1 + root[:255]) / 32).all()
    assert root[255] == pytest.approx(251)


# ---- the rounding


def test_random_bits_have_known_values():
    """A run that is interrupted goes on with the same ones, whatever version it is continued with."""
    first = noise(0, 1, 2)
    assert int(first) == 2573739075
    assert random_bits(first, 4).tolist() == [1271524343, 2550206000, 4108208731, 1549733228]
    assert noise(0, 1, 2, 3) == np.uint32((int(first) + 3 * 0x9E3779B9) % 2**32)


def test_random_bits_depend_on_seed_step_block_and_element():
    reference = random_bits(noise(1, 2, 3), 4096)
    for other in (noise(2, 2, 3), noise(1, 3, 3), noise(1, 2, 4), noise(12, 3, 0), noise(1, 2, 3, 1)):
        assert (random_bits(other, 4096) == reference).sum() < 3
    assert np.array_equal(random_bits(noise(1, 2, 3, 100), 900), reference[100:1000])


def test_random_bits_look_random():
    """Each half uniform; no half known from the other one, from a neighbour's or from the same element's next step."""
    num = 1 << 20
    now, later = (random_bits(noise(0, step, 5), num) for step in (1, 2))
    halves = {"low": now & 0xFFFF, "high": now >> 16}
    pairs = {"halves": (halves["low"], halves["high"])}
    for name, half in halves.items():
        pairs |= {f"{name} {lag}": (half[:-lag], half[lag:]) for lag in (1, 2, 3, 8, 16, 64, 896, 2048)}
    pairs |= {"step low": (halves["low"], later & 0xFFFF), "step high": (halves["high"], later >> 16)}
    for name, (a, b) in pairs.items():
        counts = np.bincount((a >> 10).astype(np.int64) * 64 + (b >> 10), minlength=4096)
        expected = a.size / 4096
        excess = (((counts - expected) ** 2 / expected).sum() - 4095) / np.sqrt(2 * 4095)
        assert abs(excess) < 6, name


@pytest.mark.parametrize("moments", NARROW)
def test_moments_follow_the_exact_ones_on_average(moments):
    """In 400 steps v falls by a fifth, in each by less than a step of its format: the nearest would be the old one.

    One element of each group keeps its v, hence the scale: else falling scales would take codes that stay along.
    """
    length, rng = 64 * 400, np.random.default_rng(0)
    size = np.exp(rng.standard_normal(length)).astype(np.float32)
    size[::GROUP] = 40
    after = np.where(size == 40, np.sqrt(0.001), 0.02).astype(np.float32)
    narrow, exact_m, exact_v = States(moments, length), np.zeros(length), np.zeros(length)
    for step in range(1, 401):
        grads = size if step == 1 else after * size
        narrow.step(narrow_update(moments), step, grads, grad_scale=1.0)
        exact_m += 0.1 * (grads - exact_m)
        exact_v += 0.001 * (np.square(grads.astype(np.float64)) - exact_v)
    m, v = (kept[size != 40] for kept in narrow.m_and_v())
    start, exact_m, exact_v = (kept[size != 40] for kept in (0.001 * size**2, exact_m, exact_v))
    assert (exact_v / start).max() < 0.82
    assert (m / exact_m).mean() == pytest.approx(1, abs=0.01)
    assert np.sqrt(v / exact_v).mean() == pytest.approx(1, abs=0.02)
    assert np.sqrt(v / exact_v).std() < {"bfloat16": 0.05, "int8": 0.2}[moments]


@pytest.mark.parametrize("moments", NARROW)
def test_updates_stay_bounded_where_gradients_of_a_group_differ_by_ten_orders(moments):
    """An element far below its group's largest loses precision, never its v: m / sqrt(v) cannot run away."""
    rng, length = np.random.default_rng(1), 64 * 64
    size = 10.0 ** rng.uniform(-10, 0, length)
    states, most, adamw = States(moments, length), 0.0, AdamW(lr=1.0, weight_decay=0.0, eps=1e-30)
    for step in range(1, 200):
        grads = (rng.standard_normal(length) * size * (rng.random(length) < 0.3)).astype(np.float32)
        for name in ("weights", "residual"):
            states.named[name][:] = 0
        states.step(narrow_update(moments), step, grads, lr=1.0, grad_scale=1.0, adamw=adamw)
        most = max(most, float(np.abs(states.master()).max()))
    assert 1 <= most < 12  # exact AdamW: at most 0.1 / sqrt(0.001) = 3.2 after many steps
