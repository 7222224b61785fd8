"""The timeline of real streams: what overlaps, what is exposed, and that unrecorded steps know nothing of it.

Kernels are made longer than copies, or copies than kernels, by so much that the outcome does not depend on the machine.
"""

import time
from itertools import pairwise

import pytest
import torch

import horizon
from horizon.models.blocks import BlockModel
from horizon.stream.timeline import Cause, CudaClock
from tests.gpu.models import DEVICE, EAGER, batches, build, differing, engine

pytestmark = pytest.mark.gpu

CYCLES = 40_000_000  # about twenty milliseconds, longer than a block's copies
VOCAB = 512
LARGE = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, **EAGER,
}  # fmt: skip


def recorded(num_steps=2, *, prepare=lambda streamed: None, max_grad_norm=1.0, **memory):
    """(timelines, split) of steady steps that stream every block and whose backward runs every layer again."""
    memory = horizon.MemoryConfig(recompute="full", policy="dram", **memory)
    with engine(LARGE, compute_dtype="bfloat16", memory=memory, max_grad_norm=max_grad_norm) as streamed:
        step = batches(2, rows=1, tokens=8, vocab=VOCAB)
        streamed.step(step), streamed.step(step)
        prepare(streamed)
        with streamed.trace() as recording:
            for _ in range(num_steps):
                streamed.step(step)
        return recording.steps, recording.split


@pytest.fixture
def slow_layers(monkeypatch):
    layer = BlockModel._run_layer

    def slow(self, *args):
        torch.cuda._sleep(CYCLES)
        return layer(self, *args)

    monkeypatch.setattr(BlockModel, "_run_layer", slow)


def overlap(first, second):
    """Seconds in which spans of both lists are open."""
    return sum(max(0.0, min(a.end, b.end) - max(a.start, b.start)) for a in first for b in second)


def works(step, block=None):
    return [s for s in step.lane("compute") if s.cause is Cause.arithmetic and block in (None, s.block)]


def waits_for_weights(step):
    return [s for s in step.lane("compute") if s.what == "weights"]


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_every_moment_of_compute_has_a_cause_and_copies_run_beside_it(slow_layers, max_grad_norm):
    steps, split = recorded(max_grad_norm=max_grad_norm)
    for step in steps:
        for lane in (step.lane("compute"), step.lane("host")):
            assert lane[0].start == step.start and lane[-1].end == step.end
            assert all(before.end == after.start for before, after in pairwise(lane))
        for lane in (step.lane("H2D"), step.lane("D2H")):
            assert all(span.end > span.start for span in lane)
            assert all(before.end <= after.start + 1e-5 for before, after in pairwise(lane))
        assert [s.block for s in works(step) if s.what == "forward"][:5] == [0, 1, 2, 3, 4]
        assert overlap(step.lane("H2D"), works(step)) > 0.5 * sum(s.seconds for s in step.lane("H2D")[1:])
        assert overlap(step.lane("D2H"), works(step)) > 0
    parts = split.arithmetic_ms, split.link_ms, split.optimizer_ms, split.disk_ms, split.data_ms, split.launch_ms
    assert sum(parts) == pytest.approx(split.step_ms)
    assert split.arithmetic_ms == max(parts)
    assert split.update_bytes > 0 and split.update_ms > 0


def test_a_loads_bytes_and_time_make_a_believable_speed():
    _, split = recorded()
    weights = next(t for t in split.traffic if t.what == "weights")
    assert weights.num_bytes == weights.least_bytes
    assert 1e9 < weights.num_bytes / weights.busy_ms * 1e3 < 1e12


def test_with_one_slot_each_load_is_exposed_and_with_two_kernels_hide_it(slow_layers):
    (one,), split_one = recorded(1, weight_slots=1)
    (two,), split_two = recorded(1, weight_slots=2)
    layers = {1, 2, 3, 4}
    assert layers <= {s.block for s in waits_for_weights(one)}
    assert overlap(one.lane("H2D"), [s for s in works(one) if s.block in layers]) < 0.1 * split_one.arithmetic_ms / 1e3
    hidden = {2, 3, 4}  # blocks that load behind a layer's kernels, in the forward; and in the backward all
    assert not hidden & {s.block for s in waits_for_weights(two)}
    assert split_two.link_ms < split_one.link_ms


def test_a_slow_update_is_the_optimizers_fault():
    def slow_down(streamed):
        update = streamed._runtime._updater._update
        streamed._runtime._updater._update = lambda *args: (time.sleep(0.02), update(*args))

    (_, step), split = recorded(prepare=slow_down, update_threads=1)
    assert split.optimizer_ms == max(split.optimizer_ms, split.link_ms, split.data_ms, split.launch_ms)
    assert {0, 1} <= {s.block for s in step.lane("compute") if s.cause is Cause.optimizer}
    updates = [s for s in step.spans if s.lane.startswith("update")]
    waits = [s for s in step.lane("host") if s.what == "update"]
    seen = [wait for wait in waits if any(s.block == wait.block for s in updates)]  # not begun before the recording
    assert seen
    for wait in seen:
        last = max(s.end for s in updates if s.block == wait.block)
        assert wait.start - 1e-3 < last < wait.end + 1e-3


def test_kernels_shorter_than_their_launches_are_at_the_hosts_pace(slow_layers, monkeypatch):
    _, ahead = recorded()
    assert ahead.host_paced_ms < 0.5 * ahead.arithmetic_ms
    embed = BlockModel.embed

    def slowly(self, *args):
        found = embed(self, *args)
        time.sleep(0.05)  # longer than anything else on the device may hold these kernels up
        return found

    monkeypatch.setattr(BlockModel, "embed", slowly)
    with engine(build("llama")) as streamed:
        streamed.step(batches()), streamed.step(batches())
        with streamed.trace() as recording:
            streamed.step(batches())
    forward = [s for s in works(recording.steps[0]) if s.what == "forward" and s.block == 0]
    assert forward and all(s.paced > 0.9 * s.seconds for s in forward)


def test_a_step_that_is_not_recorded_takes_no_points(monkeypatch):
    taken, point, event = [], CudaClock.point, torch.cuda.Event

    def counted(self, stream):
        taken.append(stream)
        return point(self, stream)

    class Untimed(event):
        def __new__(cls, enable_timing=False, **kwargs):
            taken.append("timing event" if enable_timing else None)
            return super().__new__(cls, enable_timing=enable_timing, **kwargs)

    with engine(build("llama")) as streamed:
        streamed.step(batches())
        monkeypatch.setattr(CudaClock, "point", counted)
        monkeypatch.setattr(torch.cuda, "Event", Untimed)
        streamed.step(batches())
        assert not [x for x in taken if x is not None]
        with streamed.trace():
            streamed.step(batches())
        num_points = len(taken)
        assert num_points > 0
        streamed.step(batches())
        assert not [x for x in taken[num_points:] if x is not None]


def test_recording_changes_no_bit():
    model, found = build("llama, tied", **EAGER), []
    for traced in (False, True):
        with engine(model, compute_dtype="bfloat16") as streamed:
            if traced:
                with streamed.trace():
                    streamed.step(batches(2)), streamed.step(batches(2, seed=1))
            else:
                streamed.step(batches(2)), streamed.step(batches(2, seed=1))
            found.append(dict(streamed.named_master_parameters()))
    assert differing(*found) == []


def test_the_two_clocks_agree():
    """A point that the device reaches at once lies between the host's times around it."""
    clock, stream = CudaClock(), torch.cuda.current_stream(DEVICE)
    torch.cuda.synchronize(DEVICE)
    anchor = clock.anchor(stream)
    before = clock.now()
    point = clock.point(stream)
    torch.cuda.synchronize(DEVICE)
    assert before - 1e-3 < clock.seconds(anchor, point) < clock.now() + 1e-3
