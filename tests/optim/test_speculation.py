"""Updates begun before the norm is known: nothing of them shows when nothing is clipped, and little when it is."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon.optim.adamw import AdamW, step_scalars
from horizon.optim.kernel import PIECE, speculation_kernels, update_numba
from horizon.optim.speculation import FLOOR, Speculation, inverses, longest_step, trust
from horizon.optim.updater import Updater
from horizon.store.split import join_master, split_master
from tests.optim.test_updater import ADAMW, Host, RecordingLedger, assert_same, block, masters

BETAS = [(0.9, 0.999), (0.9, 0.95), (0.95, 0.999), (0.8, 0.99), (0.0, 0.9), (0.9, 0.99999)]


class Chunk:
    """The arrays of a chunk as the kernels take them, with the history of gradients that has made them."""

    def __init__(self, master, adamw, history, bits=False):
        self.adamw, self.bits, self.step = adamw, bits, len(history) + 1
        hi, lo = split_master(torch.from_numpy(np.asarray(master, np.float32)))
        moments = (np.zeros(hi.numel(), np.float32) for _ in range(2))
        self.arrays = [*(half.view(torch.int16).numpy().view(np.uint16) for half in (hi, lo)), *moments]
        for step, gradient in enumerate(history, start=1):
            update_numba(*self.arrays, self.as_kept(gradient), step_scalars(adamw, adamw.lr, step, 1.0, True))

    def as_kept(self, gradient):
        gradient = torch.from_numpy(np.broadcast_to(np.asarray(gradient, np.float32), self.arrays[0].shape).copy())
        return gradient.bfloat16().view(torch.int16).numpy().view(np.uint16) if self.bits else gradient.numpy()

    def scalars(self, scale):
        return step_scalars(self.adamw, self.adamw.lr, self.step, scale, True)

    def copy(self):
        other = object.__new__(Chunk)
        other.adamw, other.bits, other.step = self.adamw, self.bits, self.step
        other.arrays = [array.copy() for array in self.arrays]
        return other

    def updated(self, gradient, scale):
        """What the plain update makes of it."""
        other = self.copy()
        update_numba(*other.arrays, self.as_kept(gradient), self.scalars(scale))
        return other

    def speculated(self, gradient):
        """(what speculating makes of it, the marks of pieces that wait)."""
        other, waits = self.copy(), np.ones(-(-self.arrays[0].size // PIECE), np.uint8)
        scalars = self.scalars(1.0)
        speculate, _, _ = speculation_kernels()
        speculate(*other.arrays, self.as_kept(gradient), waits, *scalars, *trust(scalars, self.adamw.lr))
        return other, waits

    def finished(self, gradient, waits, scale):
        """What settling makes of a speculated chunk."""
        other, scalars = self.copy(), self.scalars(scale)
        _, settle, _ = speculation_kernels()
        settle(*other.arrays, self.as_kept(gradient), waits, *scalars, *inverses(scalars))
        return other

    def restored(self, gradient, waits):
        other, scalars = self.copy(), self.scalars(1.0)
        _, _, restore = speculation_kernels()
        restore(*other.arrays, self.as_kept(gradient), waits, *scalars, *inverses(scalars))
        return other

    @property
    def master(self):
        return join_master(*(torch.from_numpy(half.view(np.int16)) for half in self.arrays[:2])).numpy()

    def values(self):
        return self.master, self.arrays[2], self.arrays[3]


def same(a, b):
    return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in zip(a.arrays, b.arrays, strict=True))


def ulps(found, expected, *sizes):
    """|found - expected| in units in the last place of the largest of `sizes`, element by element."""
    largest = np.max([np.abs(np.asarray(size, np.float32)) for size in sizes], axis=0)
    return np.abs(found.astype(np.float64) - expected.astype(np.float64)) / np.spacing(largest.astype(np.float32))


def distances(before, plain, exact, found, gradient):
    """(weights, m, v) in the units of `docs/numerics.md`: how far a corrected update is from the exact one."""
    (p0, m0, v0), (p1, m1, v1), (p, m, v), (fp, fm, fv) = (c.values() for c in (before, plain, exact, found))
    beta1, lr = before.adamw.betas[0], before.adamw.lr
    grads = before.as_kept(gradient)
    grads = torch.from_numpy(grads.view(np.int16)).view(torch.bfloat16).float().numpy() if before.bits else grads
    return (
        ulps(fp, p, p0, p1, p, np.full_like(p, FLOOR * lr)),
        ulps(fm, m, m0, m1, (1 - beta1) * grads),
        ulps(fv, v, v0, v1),
    )


exponents = st.floats(-12, 1.5)
signed = st.builds(lambda sign, exponent: sign * 10.0**exponent, st.sampled_from([-1.0, 1.0]), exponents)
gradients = st.one_of(signed, st.just(0.0))


@given(
    weight=gradients, history=st.lists(gradients, max_size=6), gradient=gradients, repeat=st.sampled_from([1, 1, 10]),
    scale=st.floats(-9, -1e-7).map(lambda exponent: 10.0**exponent), lr=st.floats(-7, -1).map(lambda e: 10.0**e),
    betas=st.sampled_from(BETAS), weight_decay=st.sampled_from([0.0, 0.1]), bits=st.booleans(),
)  # fmt: skip
@settings(max_examples=600, deadline=None)
def test_an_element_that_is_corrected_is_within_four_ulp(
    weight, history, gradient, repeat, scale, lr, betas, weight_decay, bits
):
    adamw = AdamW(lr=lr, betas=betas, weight_decay=weight_decay)
    before = Chunk([weight], adamw, history * repeat, bits)
    plain, exact = before.updated(gradient, 1.0), before.updated(gradient, scale)
    speculated, waits = before.speculated(gradient)
    assert same(speculated, before if waits[0] else plain)
    assert same(speculated.finished(gradient, waits, 1.0), plain)
    found = speculated.finished(gradient, waits, scale)
    if waits[0]:
        assert same(found, exact)
        assert same(speculated.restored(gradient, waits), before)
    else:
        assert max(map(np.max, distances(before, plain, exact, found, gradient))) <= 4
        restored = speculated.restored(gradient, waits)
        weights, m, v = map(np.max, distances(before, plain, before, restored, gradient))
        assert max(weights, v) <= 4 and (m <= 4 or betas[0] == 0)  # a beta of 0 makes no use of the old m


def test_what_is_not_trusted_could_not_be_corrected():
    """An element at rest, then a gradient beside which nothing is left of its old second moment."""
    adamw = AdamW(lr=1e-7, weight_decay=0.0)
    before = Chunk([-1.0], adamw, [-2.4e-4])
    _, waits = before.speculated(-1.0)
    assert waits.tolist() == [1]
    plain, exact = before.updated(-1.0, 1.0), before.updated(-1.0, 1e-5)
    found = plain.finished(-1.0, np.zeros(1, np.uint8), 1e-5)
    assert distances(before, plain, exact, found, -1.0)[0] > 16


@given(st.lists(gradients, min_size=1, max_size=6), st.sampled_from([1, 4, 40]), st.sampled_from(BETAS))
@settings(max_examples=200, deadline=None)
def test_no_step_is_longer_than_the_longest(history, repeat, betas):
    chunk = Chunk([0.0], AdamW(lr=1e-3, betas=betas, weight_decay=0.0, eps=1e-30), history * repeat)
    scalars, (_, m, v) = chunk.scalars(1.0)._replace(), chunk.values()
    if v[0] > 1e-30:
        step = abs(float(scalars.nstep) * m[0]) / (np.sqrt(v[0]) / float(scalars.rbc2))
        assert step <= longest_step(scalars) * (1 + 1e-4)


def test_moments_of_usual_gradients_are_trusted_and_outliers_wait_with_their_piece_alone():
    draw = np.random.default_rng(0).standard_normal
    size = 8 * PIECE + 64
    before = Chunk(0.02 * draw(size), AdamW(lr=1e-5), [1e-4 * draw(size) for _ in range(6)], bits=True)
    gradient = (1e-4 * draw(size)).astype(np.float32)
    _, waits = before.speculated(gradient)
    assert waits.sum() <= 1
    gradient[3 * PIECE + 5] = 1e3
    speculated, waits = before.speculated(gradient)
    assert waits[3] and waits.sum() <= 2
    plain, exact = before.updated(gradient, 1.0), before.updated(gradient, 0.25)
    assert same(speculated.finished(gradient, waits, 1.0), plain)
    found = speculated.finished(gradient, waits, 0.25)
    assert max(map(np.max, distances(before, plain, exact, found, gradient))) <= 4
    third = slice(3 * PIECE, 4 * PIECE)
    assert all(np.array_equal(a[third], b[third]) for a, b in zip(found.arrays, exact.arrays, strict=True))


@pytest.mark.parametrize("history", [[], [0.0]], ids=["first step", "not used before"])
def test_elements_without_a_past_come_back_exactly(history):
    before = Chunk(np.linspace(-1, 1, 128), AdamW(lr=1e-2, weight_decay=0.1), history)
    gradient = np.random.default_rng(0).standard_normal(128).astype(np.float32)
    speculated, waits = before.speculated(gradient)
    assert not waits.any()
    moments = speculated.restored(gradient, waits).values()[1:]
    assert not any(moment.any() for moment in moments)


# ---- all blocks of a step, on the updater's threads


class Trained:
    """Some blocks after a plain step, about to see a second one."""

    def __init__(self, num_threads=2, chunk_elements=128, num_blocks=4, frozen=()):
        self.layouts = [block(index, trainable=index not in frozen) for index in range(num_blocks)]
        self.host, self.ledger = Host(self.layouts), RecordingLedger(num_blocks)
        self.updater = Updater(
            self.layouts, self.host, self.ledger, ADAMW, num_threads, self.host.released.append, chunk_elements
        )
        self.updater.submit(1, ADAMW.lr, 1.0)
        self.updater.wait()
        self.speculation = Speculation(self.updater)
        self.speculation.begin(2, ADAMW.lr)
        self.before = [*map(masters, self.host.states.values())]
        self.host.asked.clear(), self.host.released.clear(), self.ledger.published.clear()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.updater.close()

    def speculate(self, *blocks):
        for index in blocks:
            self.speculation.speculate(index)
        self.updater.wait_idle()


def exactly(scale, change=lambda host: None, **settings):
    """The same blocks after an exact second step."""
    with Trained(**settings) as trained:
        change(trained.host)
        trained.updater.submit(2, ADAMW.lr, scale)
        trained.updater.wait()
        return trained.host


def largest_distance(found, expected):
    """In units in the last place: a master's of at least 16 learning rates, a moment's of at least the gradient's."""
    worst = 0.0
    beta1, beta2 = ADAMW.betas
    for a, b in zip(found.states.values(), expected.states.values(), strict=True):
        grads = torch.from_numpy(a.grads.view(np.int16)).view(torch.bfloat16).float().numpy()
        p, q = masters(a).numpy(), masters(b).numpy()
        worst = max(worst, ulps(p, q, p, q, np.full_like(p, FLOOR * ADAMW.lr)).max())
        worst = max(worst, ulps(a.exp_avg, b.exp_avg, a.exp_avg, b.exp_avg, (1 - beta1) * grads).max())
        worst = max(worst, ulps(a.exp_avg_sq, b.exp_avg_sq, a.exp_avg_sq, b.exp_avg_sq, (1 - beta2) * grads**2).max())
    return worst


@pytest.mark.parametrize("num_threads, chunk_elements", [(1, 64), (3, 128), (2, 1 << 21)])
@pytest.mark.parametrize("blocks", [[3, 2, 1, 0], [3, 1], []], ids=["all", "some", "none"])
def test_a_step_that_is_not_clipped_is_the_exact_one_bit_for_bit(num_threads, chunk_elements, blocks):
    with Trained(num_threads, chunk_elements) as trained:
        trained.speculate(*blocks)
        assert [trained.ledger.version(index) for index in range(4)] == [1] * 4  # nobody may load them yet
        assert trained.host.released == []
        assert trained.speculation.settle(1.0) == 0
        trained.updater.wait()
        assert_same(trained.host, exactly(1.0))
        assert sorted(trained.host.released) == [0, 1, 2, 3]
        assert trained.speculation.undo() == 4  # too late


def test_blocks_that_are_done_are_published_at_once_and_the_others_in_order():
    with Trained(num_threads=1) as trained:
        trained.speculate(3, 1)
        assert all(not waits.any() for index in (3, 1) for waits in trained.speculation._blocks[index].waits)
        trained.host.asked.clear()
        trained.speculation.settle(1.0)
        assert [trained.ledger.version(index) for index in (1, 3)] == [2, 2]
        trained.updater.wait()
        assert trained.ledger.published == [(2, 1), (2, 3), (2, 0), (2, 2)]
        assert trained.host.asked == [0, 2]  # nobody looks at the others again


@pytest.mark.parametrize("num_threads, chunk_elements", [(1, 64), (3, 128)])
@pytest.mark.parametrize("blocks", [[3, 2, 1, 0], [3, 2]], ids=["all", "some"])
@pytest.mark.parametrize("scale", [0.9, 0.5, 1e-4])
def test_a_step_that_is_clipped_is_corrected_and_counted(num_threads, chunk_elements, blocks, scale):
    with Trained(num_threads, chunk_elements) as trained:
        trained.speculate(*blocks)
        assert trained.speculation.settle(scale) == len(blocks)
        trained.updater.wait()
        expected = exactly(scale)
        assert largest_distance(trained.host, expected) <= 4
        for index in set(range(4)) - set(blocks):
            for a, b in zip(trained.host.states[index].arrays(), expected.states[index].arrays(), strict=True):
                np.testing.assert_array_equal(a, b)
        assert largest_distance(trained.host, exactly(1.0)) > 100  # the plain update is something else
        assert [trained.ledger.version(index) for index in range(4)] == [2] * 4


def test_what_is_undone_is_as_before_and_can_be_repeated():
    with Trained() as trained:
        trained.speculate(3, 2, 1)
        assert trained.speculation.undo() == 0
        for states, before in zip(trained.host.states.values(), trained.before, strict=True):
            p, q = masters(states).numpy(), before.numpy()
            assert ulps(p, q, p, q, np.full_like(p, FLOOR * ADAMW.lr)).max() <= 4
        assert torch.equal(masters(trained.host.states[0]), trained.before[0])
        assert trained.ledger.published == []
        trained.speculation.begin(2, ADAMW.lr)
        trained.speculate(3, 2, 1, 0)
        assert trained.speculation.settle(1.0) == 0
        trained.updater.wait()
        assert largest_distance(trained.host, exactly(1.0)) <= 8
