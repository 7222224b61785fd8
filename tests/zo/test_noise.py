"""The noise: the same bits from every kernel and in any order, and normal."""

import math

import numpy as np
import pytest
import torch

from horizon.zo import noise
from horizon.zo.host_kernel import run_piece
from horizon.zo.noise import GROUP, HALF, ROUNDING, Key, noise_key
from tests.zo.reference import block_normals

MANY = 512 * GROUP  # a million


def drawn(key, num_elements=MANY, first_pair=0):
    """What the host's kernel adds to zeros."""
    (w, plus, minus), groups = np.zeros((3, num_elements), np.float32), num_elements // GROUP
    row, decays = np.array([key.first, key.second], np.uint32), np.zeros(groups, np.uint32)
    run_piece(w, plus, minus, row, 0, first_pair, groups, decays, 1.0, 0, False)
    return plus


@pytest.mark.parametrize("key", [noise_key(0, 1, 0, 0), noise_key(7, 20_000, 3, 49), Key(0, 0), Key(2**32 - 1, 2**31)])
def test_the_host_kernel_computes_what_is_written_down(key):
    found, expected = drawn(key, 128 * GROUP), block_normals(key, 128 * GROUP)
    assert np.array_equal(found, expected)


def test_a_block_may_be_drawn_in_any_order_and_in_any_pieces():
    key, pieces = noise_key(3, 5, 0, 2), np.empty(64 * GROUP, np.float32)
    for group in np.random.default_rng(0).permutation(64):
        pieces[group * GROUP : (group + 1) * GROUP] = drawn(key, GROUP, first_pair=int(group) * HALF)
    assert np.array_equal(pieces, drawn(key, 64 * GROUP))


def test_fma_rounds_once():
    a, b = np.float32(1 + 2**-12), np.float32(1 + 2**-12)  # a * b has a 1 in its 24th place after the point
    c = np.float32(-1 - 2**-11)
    assert noise.fma(a, b, c) == np.float32(2**-24)
    assert np.float32(a * b) + c == 0
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(100_000).astype(np.float32) for _ in range(3))
    exact = a.astype(np.longdouble) * b + c  # 64 bits: wrong only where it rounds to a tie
    assert np.mean(noise.fma(a, b, c) != exact.astype(np.float32)) < 1e-6


def test_normals_are_what_the_formula_says():
    key, pairs = noise_key(1, 1, 0, 0), np.arange(1 << 16, dtype=np.uint32)
    words_a, words_b = (word.astype(np.float64) for word in noise.words(key, pairs))
    radius = np.sqrt(-2 * np.log(1 - (words_a // 1024 * 2 + 1) / 2**23))
    z_a, z_b = (z.astype(np.float64) for z in noise.normals(key, pairs))
    assert np.allclose(np.hypot(z_a, z_b), radius, atol=2e-6)
    offset = (words_b % 2**23) / 2**23 - 0.5  # of a quarter turn
    turned = np.abs(np.arctan2(np.minimum(abs(z_a), abs(z_b)), np.maximum(abs(z_a), abs(z_b))))
    assert np.allclose(turned[radius > 0.1], (abs(offset) * math.pi / 2)[radius > 0.1], atol=2e-6)


@pytest.mark.parametrize("key", [noise_key(0, 1, 0, 0), noise_key(0, 2, 0, 0), noise_key(5, 1, 1, 31)])
def test_moments_and_distribution_are_the_normal_ones(key):
    z = drawn(key).astype(np.float64)
    error = 5 / math.sqrt(MANY)  # five standard errors, times the standard deviation of each power
    assert abs(z.mean()) < error
    assert abs((z**2).mean() - 1) < error * math.sqrt(2)
    assert abs((z**3).mean()) < error * math.sqrt(15)
    assert abs((z**4).mean() - 3) < error * math.sqrt(96)
    assert 4.5 < np.abs(z).max() <= 5.66
    cumulated = (0.5 * (1 + torch.erf(torch.from_numpy(np.sort(z)) / math.sqrt(2)))).numpy()
    distance = np.abs(cumulated - (np.arange(MANY) + 0.5) / MANY).max()
    assert distance * math.sqrt(MANY) < 1.95  # Kolmogorov and Smirnov, one in a thousand


KEYS = {
    "step": (noise_key(0, 1, 0, 0), noise_key(0, 2, 0, 0)),
    "query": (noise_key(0, 1, 0, 0), noise_key(0, 1, 1, 0)),
    "block": (noise_key(0, 1, 0, 0), noise_key(0, 1, 0, 1)),
    "seed": (noise_key(0, 1, 0, 0), noise_key(1, 1, 0, 0)),
    "rounding": (noise_key(0, 1, 0, 0), noise_key(0, 1, ROUNDING, 0)),
}


@pytest.mark.parametrize("what", KEYS)
def test_another_step_query_block_or_seed_draws_independent_noise(what):
    one, other = (drawn(key).astype(np.float64) for key in KEYS[what])
    error = 5 / math.sqrt(MANY)
    assert abs((one * other).mean()) < error
    assert abs(((one**2 - 1) * (other**2 - 1)).mean()) < 2 * error
    assert np.isin(one[:1000], other[:1000]).sum() == 0


@pytest.mark.parametrize("shift", [1, 2, 63, 64, HALF, GROUP])
def test_neighbours_are_independent(shift):
    z = drawn(noise_key(2, 9, 0, 4)).astype(np.float64)
    error = 5 / math.sqrt(MANY - shift)
    assert abs((z[shift:] * z[:-shift]).mean()) < error
    assert abs(((z[shift:] ** 2 - 1) * (z[:-shift] ** 2 - 1)).mean()) < 2 * error


def test_words_do_not_repeat_and_fill_their_square():
    key, num = noise_key(0, 1, 0, 3), 1 << 20
    a, b = noise.words(key, np.arange(num, dtype=np.uint32))
    assert len(np.unique(a)) == num
    cells = np.bincount((a >> 25).astype(int) * 128 + (b >> 25).astype(int), minlength=128 * 128)
    expected = num / 128**2
    deviation = (((cells - expected) ** 2 / expected).sum() - (128**2 - 1)) / math.sqrt(2 * (128**2 - 1))
    assert abs(deviation) < 5


def test_keys_do_not_repeat():
    keys = {noise_key(seed, step, query, block) for seed in (0, 1) for step in range(1, 200)
            for query in (0, 1, ROUNDING) for block in range(40)}  # fmt: skip
    assert len(keys) == 2 * 199 * 3 * 40
    assert noise_key(-1, 1, 0, 0) != noise_key(1, 1, 0, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_keeps_what_the_format_holds_and_is_right_on_average(dtype):
    rng = np.random.default_rng(0)
    w = torch.from_numpy(rng.standard_normal(4096).astype(np.float32) * 0.02)
    held = w.to(dtype).float().numpy()
    word = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    assert np.array_equal(noise.rounded(held, word, dtype), held)
    value, num = np.float32(0.0200123), 1 << 20
    rounded = noise.rounded(np.full(num, value), rng.integers(0, 2**32, num, dtype=np.uint32), dtype)
    assert np.array_equal(torch.from_numpy(rounded).to(dtype).float().numpy(), rounded)
    assert len(np.unique(rounded)) == 2
    spread = np.ptp(rounded)
    assert abs(rounded.astype(np.float64).mean() - value) < 5 * spread / math.sqrt(num)


def test_small_numbers_of_fp16_are_rounded_to_the_nearest():
    w = np.array([2.0**-25 * 1.5, 2.0**-24 * 10.4, -(2.0**-20) - 2.0**-26, 0.0], np.float32)
    expected = torch.from_numpy(w).half().float().numpy()
    assert np.array_equal(noise.rounded(w, np.full(4, 2**32 - 1, np.uint32), torch.float16), expected)
