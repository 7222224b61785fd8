"""When clipping happens never changes more than it says: speculative steps are exact ones, lagged steps lag by one."""

import logging
import time

import numpy as np
import pytest
import torch

import horizon
from horizon import MemoryConfig
from horizon.optim import speculation, updater
from horizon.optim.speculation import FLOOR, Speculation
from tests.covering import pairwise
from tests.parity.reference import (
    Resident,
    assert_same,
    assert_same_tensors,
    engine_for,
    num_trained,
    outcome,
    padded,
    plain,
    prompted,
    streamed_step,
)
from tests.parity.test_frozen import PATTERNS
from tests.parity.test_schedules import DEPTH, TIED, deep, offloading

FAR = 1e9  # a norm that no step here has


def steps(num=4):
    return [[padded(seed, [12, 7]), prompted(seed + 10, trained=3)] for seed in range(num)]


def quieter(logits, batch):
    """A third of the usual loss, and of its gradients."""
    return loss(logits, batch) / 3


def loss(logits, batch):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.fixture
def begun(monkeypatch):
    """The blocks whose update was begun before the norm was known, in order; each is done before the next lands."""
    blocks, speculate = [], Speculation.speculate

    def patient(self, block):
        blocks.append(block)
        speculate(self, block)
        self._updater.wait_idle()

    monkeypatch.setattr(Speculation, "speculate", patient)
    return blocks


def run(model, batches, **settings):
    """Outcomes step by step; the updates of each are waited for."""
    with engine_for(model, **settings) as engine:
        return [streamed_step(engine, step) for step in batches]


# ---- speculative


@pytest.mark.parametrize(("tied", "threads"), [(False, 1), (True, 3)])
def test_steps_that_are_not_clipped_are_the_exact_ones_bit_for_bit(tied, threads, begun, monkeypatch):
    monkeypatch.setattr(updater.Updater.__init__, "__defaults__", (512,))  # chunks: several to a parameter
    resident = Resident(deep(tied), max_grad_norm=FAR)
    expected = [resident.step(batches) for batches in steps()]
    memory = MemoryConfig(update_threads=threads)
    found = run(deep(tied), steps(), max_grad_norm=FAR, clip="speculative", memory=memory)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)
    walk = [*reversed(range(DEPTH + 2))]
    assert begun == walk * 3  # the first step waits: nothing is known of how large its gradients may be


@pairwise(num_blocks=[1, 3, DEPTH + 2], clip=["speculative", "lagged"], tied=[False, True])
def test_blocks_in_hbm(num_blocks, clip, tied, begun):
    """They wait for the norm, or lag like the others; either way nothing shows of where they are."""
    found = []
    for num in (0, num_blocks):
        memory = MemoryConfig(policy="hbm_first", hbm_blocks=num)
        with engine_for(deep(tied), max_grad_norm=3.5 if clip == "lagged" else FAR, clip=clip, memory=memory) as engine:
            assert len(engine._runtime.store.in_hbm) == num
            results = [engine.step(batches) for batches in steps()]
            numbers = [(r.loss, r.grad_norm, r.clip_scale, r.corrected_blocks) for r in results]
            found.append((numbers, dict(engine.named_master_parameters())))
    assert found[0][0] == found[1][0]
    assert_same_tensors(found[1][1], found[0][1])
    assert len(begun) == (3 * (2 * (DEPTH + 2) - num_blocks) if clip == "speculative" else 0)


@TIED
def test_steps_that_follow_each_other_at_once(tied, monkeypatch):
    """Nobody waits for updates, neither in between nor inside, however long they take."""
    found = []
    for clip, slow in (("exact", False), ("speculative", False), ("speculative", True)):
        with engine_for(deep(tied), max_grad_norm=FAR, clip=clip) as engine:
            if slow:
                slow_down(engine, monkeypatch)
            done = [engine.step(batches) for batches in steps()]
            found.append(([(r.loss, r.grad_norm) for r in done], dict(engine.named_master_parameters())))
    for numbers, weights in found[1:]:
        assert numbers == found[0][0]
        assert_same_tensors(weights, found[0][1])


def slow_down(engine, monkeypatch):
    """Let every pass over a chunk take long, and what waits for it show whether it does."""
    begun = engine._runtime._steps._updates._speculation
    for name in ("_speculate", "_settle"):
        work = getattr(begun, name)
        monkeypatch.setattr(begun, name, lambda *args, work=work: (time.sleep(0.003), work(*args)))


@pytest.mark.parametrize("patterns", PATTERNS.values(), ids=PATTERNS)
def test_frozen_parameters(patterns, begun):
    tied = not any("lm_head" in pattern for pattern in patterns)
    found = [
        run(deep(tied), steps(3), freeze=patterns, max_grad_norm=FAR, clip=clip) for clip in ("exact", "speculative")
    ]
    assert begun
    for a, b in zip(*found, strict=True):
        assert_same(a, b)


@TIED
def test_a_run_that_always_clips_is_the_exact_one(tied, begun):
    found = [run(deep(tied), steps(), clip=clip) for clip in ("exact", "speculative")]  # the limit is 0.5
    assert begun == []
    for a, b in zip(*found, strict=True):
        assert_same(a, b)


# Gradients that hardly change, so that none outweighs what the moments remember: every piece is trusted.
LEVEL = horizon.AdamW(lr=1e-4)


def assert_corrected(found, expected, before):
    """Every weight within 4 ulp, an ulp being that of the larger weight or of FLOOR learning rates."""
    for name, weight in expected.items():
        sizes = [before[name].abs(), weight.abs(), torch.full_like(weight, FLOOR * LEVEL.lr)]
        ulp = torch.from_numpy(np.spacing(torch.stack(sizes).amax(0).numpy()))
        assert float(((found[name] - weight).abs() / ulp).max()) <= 4, name


def partial_norms(gradients):
    """The norm of the gradients so far, as the blocks land from the head down."""
    names = [["lm_head", "model.norm"], *([f"layers.{i}."] for i in reversed(range(DEPTH))), ["embed_tokens"]]
    squares, found = 0.0, []
    for block in names:
        squares += sum(
            float(g.double().square().sum()) for n, g in gradients.items() if any(part in n for part in block)
        )
        found.append(squares**0.5)
    return found


@TIED
@pytest.mark.parametrize(("late", "in_hbm"), [(3, 0), (DEPTH + 1, 0), (DEPTH + 1, 2)])
def test_a_step_that_is_clipped_after_all_is_corrected_and_counted(tied, late, in_hbm, begun):
    """Two quiet steps, then one whose norm passes the limit when `late` blocks have landed and the next one does."""
    batch = plain(0)
    with engine_for(deep(tied), max_grad_norm=FAR, optimizer=LEVEL) as engine:
        for function in (quieter, quieter, loss):
            engine.step(batch, loss_fn=function)
        norms = [0.0, *partial_norms(dict(engine.named_gradients()))]
    limit = (norms[late] + norms[late + 1]) / 2
    memory = MemoryConfig(update_threads=3, policy="hbm_first", hbm_blocks=in_hbm)
    exact, found = (
        engine_for(deep(tied), max_grad_norm=limit, clip=clip, optimizer=LEVEL, memory=memory)
        for clip in ("exact", "speculative")
    )
    with exact, found:
        for _ in range(2):
            assert exact.step(batch, loss_fn=quieter).grad_norm < limit
            assert found.step(batch, loss_fn=quieter).corrected_blocks == 0
        before = dict(exact.named_master_parameters())
        begun.clear()
        one, other = (engine.step(batch, loss_fn=loss) for engine in (exact, found))
        assert (one.loss, one.grad_norm, one.clip_scale) == (other.loss, other.grad_norm, other.clip_scale)
        assert one.clip_scale < 1
        on_host = [block for block in reversed(range(DEPTH + 2)) if block not in found._runtime.store.in_hbm]
        landed = [*reversed(range(DEPTH + 2))][:late]
        assert begun == [block for block in on_host if block in landed]  # blocks in HBM wait for the norm
        assert (one.corrected_blocks, other.corrected_blocks) == (0, len(begun))
        begun.clear()
        assert_same_tensors(dict(found.named_gradients()), dict(exact.named_gradients()))
        corrected, expected = (dict(engine.named_master_parameters()) for engine in (found, exact))
        assert_corrected(corrected, expected, before)
        one, other = (engine.step(batch, loss_fn=quieter) for engine in (exact, found))
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert (other.clip_scale, other.corrected_blocks) == (1.0, 0) and len(
            begun
        ) <= late  # it waits after a clipped step


# ---- boundaries that borrow gradient buffers


@TIED
@pytest.mark.parametrize("clipped", [False, True])
def test_boundaries_in_gradient_buffers_while_corrections_read_them(tied, clipped, begun, monkeypatch):
    """The forward that follows a corrected step puts boundaries where the corrections read gradients: it waits."""
    losses = [quieter, quieter, loss, quieter]
    batch = [plain(0, tokens=60), plain(1, rows=1, tokens=60)]

    def train(engine, slow):
        if slow:
            slow_down(engine, monkeypatch)
        results = [engine.step(batch, loss_fn=function) for function in losses]
        return [(r.loss, r.grad_norm, r.corrected_blocks) for r in results], dict(engine.named_master_parameters())

    with engine_for(deep(tied)) as engine:
        norm = engine.step(batch, loss_fn=loss).grad_norm
    settings = {"max_grad_norm": 0.7 * norm if clipped else FAR, "clip": "speculative", "optimizer": LEVEL}
    with engine_for(deep(tied), **settings) as engine:
        expected = train(engine, slow=False)
    with offloading(tied, 180, 0, **settings) as engine:
        found = train(engine, slow=True)
    assert found[0] == expected[0]
    assert bool(found[0][2][2]) is clipped and begun
    assert_same_tensors(found[1], expected[1])


# ---- accumulation


@TIED
@pytest.mark.parametrize("clip", ["speculative", "lagged"])
def test_accumulated_gradients_are_clipped_exactly(tied, clip):
    found = []
    for mode in ("exact", clip):
        with engine_for(deep(tied), clip=mode) as engine:
            for batch in steps(1)[0]:
                engine.forward_backward(batch)
            found.append(outcome(engine, engine.optimizer_step()))
    assert_same(*found)


# ---- lagged


class Lagging(Resident):
    """Scales by the norm of the step before; the first step by its own."""

    last = None

    def step(self, batches):
        value = self.backward(batches)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in self.gradients().values()]))
        last = norm if self.last is None else self.last
        scale = torch.clamp(self.max_grad_norm / (last + 1e-6), max=1.0)
        for parameter in self.named.values():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._head is not None:
            self._head.data.copy_(self._embedding.data)
        self.last = norm
        return value, float(norm), float(scale)


@TIED
@pytest.mark.parametrize("limit", [0.5, 3.5, FAR])
def test_lagged_steps_are_those_of_a_loop_that_lags(tied, limit):
    model = Lagging(deep(tied), max_grad_norm=limit)
    with engine_for(deep(tied), max_grad_norm=limit, clip="lagged") as engine:
        for batches in steps():
            result = engine.step(batches)
            assert (result.loss, result.grad_norm, result.clip_scale) == model.step(batches)
            assert_same_tensors(dict(engine.named_master_parameters()), model.weights())
            assert result.corrected_blocks == 0


def test_a_lagged_run_holds_a_ring_of_gradients_and_says_what_it_is(caplog):
    with caplog.at_level(logging.WARNING, "horizon.building"), engine_for(deep(False), clip="lagged") as engine:
        assert "gradient ring" in engine.plan.table()
    assert "lagged clipping: not exact" in caplog.text


def test_after_accumulation_lagged_steps_go_on_lagging():
    model = Lagging(deep(True))
    with engine_for(deep(True), clip="lagged") as engine:
        engine.forward_backward(plain(5))
        first = engine.optimizer_step()
        assert (first.loss, first.grad_norm, first.clip_scale) == model.step([plain(5)])
        for batches in steps(2):
            result = engine.step(batches)
            assert (result.loss, result.grad_norm, result.clip_scale) == model.step(batches)
            assert_same_tensors(dict(engine.named_master_parameters()), model.weights())


def test_dropout_masks_of_the_first_lagged_step_are_those_of_its_measurement():
    """Both passes draw the same, so the first step is scaled by its own norm."""
    with engine_for(deep(False, attention_dropout=0.5), clip="lagged") as engine:
        result = engine.step(plain(0))
        assert result.clip_scale == float(torch.clamp(0.5 / (torch.tensor(result.grad_norm) + 1e-6), max=1.0))


def test_what_is_compared_is_not_all_the_same():
    """The limits of the tests above separate the modes."""
    weights = {}
    for clip in ("exact", "lagged"):
        with engine_for(deep(False), clip=clip) as engine:
            weights[clip] = [engine.step(batches) for batches in steps(2)] and dict(engine.named_master_parameters())
    assert any(not torch.equal(weights["exact"][name], weights["lagged"][name]) for name in weights["exact"])
    assert num_trained(steps(1)[0]) > 0 and speculation.REACH == 4
