import numpy as np
import pytest
import torch

from horizon.optim.kernel import join_numba, split_numba
from horizon.store.split import join_master, split_master

HIGH_HALVES = [0x0000, 0x0001, 0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0x7FC0, 0x7FFF, 0x8000, 0x8001, 0xBF80, 0xFF80, 0xFFFF]


def bits_to_master(bits):
    return torch.from_numpy(np.asarray(bits, dtype=np.uint32).view(np.float32))


def patterns():
    """Every low half under the awkward high halves, and random patterns."""
    low = np.arange(1 << 16, dtype=np.uint32)
    edges = [(np.uint32(high) << np.uint32(16)) | low for high in HIGH_HALVES]
    return np.concatenate([*edges, np.random.default_rng(0).integers(0, 1 << 32, 1 << 20, dtype=np.uint32)])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_every_pattern_comes_back(device):
    bits = patterns()
    hi, lo = split_master(bits_to_master(bits).to(device))
    np.testing.assert_array_equal(join_master(hi, lo).cpu().numpy().view(np.uint32), bits)
    for got, expected in zip((hi, lo), split_master(bits_to_master(bits)), strict=True):
        assert torch.equal(got.cpu().view(torch.int16), expected.view(torch.int16))


def test_the_kernels_of_one_thread_do_the_same():
    master = bits_to_master(patterns())
    hi, lo = split_master(master)
    high, low, joined = torch.empty_like(hi), torch.empty_like(lo), torch.empty_like(master)
    split_numba(master.view(torch.int32).numpy(), high.view(torch.int16).numpy(), low.numpy())
    assert torch.equal(high.view(torch.int16), hi.view(torch.int16)) and torch.equal(low, lo)
    join_numba(high.view(torch.int16).numpy(), low.numpy(), joined.view(torch.int32).numpy())
    assert torch.equal(joined.view(torch.int32), master.view(torch.int32))


def test_halves_are_the_documented_ones():
    bits = patterns()
    hi, lo = split_master(bits_to_master(bits))
    assert (hi.dtype, lo.dtype) == (torch.bfloat16, torch.int16)
    expected = ((bits.astype(np.uint64) + 0x8000) >> 16) & 0xFFFF  # hi is computed mod 2^32
    np.testing.assert_array_equal(hi.view(torch.int16).numpy().view(np.uint16), expected)
    np.testing.assert_array_equal(lo.numpy().view(np.uint16), bits & 0xFFFF)


def test_hi_is_nearest_with_ties_away_from_zero():
    values = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    hi, lo = split_master(values)
    tie = lo == -(1 << 15)
    assert torch.equal(hi[~tie], values[~tie].bfloat16())
    ties, _ = split_master(bits_to_master([0x3F808000, 0xBF808000, 0x3F818000]))
    assert torch.equal(ties, bits_to_master([0x3F810000, 0xBF810000, 0x3F820000]).bfloat16())


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (2, 3, 4)])
def test_shapes_are_kept(shape):
    values = torch.randn(shape)
    hi, lo = split_master(values)
    assert hi.shape == lo.shape == values.shape
    assert torch.equal(join_master(hi, lo), values)


def test_a_transposed_view_keeps_its_order():
    values = torch.randn(4, 6).t()
    hi, lo = split_master(values, out=(torch.empty(24, dtype=torch.bfloat16), torch.empty(24, dtype=torch.int16)))
    assert torch.equal(join_master(hi, lo).view(6, 4), values)
    hi, lo = split_master(values)
    assert torch.equal(join_master(hi, lo), values)


def test_out_is_filled_in_place():
    values = torch.randn(64)
    out = (torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int16))
    assert split_master(values, out=out)[0] is out[0]
    master = torch.zeros(64)
    assert join_master(*out, out=master) is master
    assert torch.equal(master, values)
