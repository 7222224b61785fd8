"""What a recorded step says: every second of compute has one cause, and it is the right one."""

import inspect
import threading
import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import horizon
from horizon.errors import HorizonError
from horizon.stream import boundaries, executor, gradients, slots, timeline
from horizon.stream.timeline import Cause, HostClock, Timeline
from tests.stream.simulated import Durations, SimulatedClock, SimulatedStream, simulate, totals
from tests.stream.steps import tiny_model

FORWARD = [("forward", 0), ("forward", 1), ("forward", 2), ("forward", 3)]
BACKWARD = [("backward", 3), ("backward", 2), ("backward", 1), ("backward", 0)]
WORK = 4 * 10 + 2 * 10 + 3 * 20 + 10  # forward; the head's both; layers again and back; back through the embedding


def lane(step, name, cause=None):
    return [(s.what, s.block) for s in step.lane(name) if cause is None or s.cause is cause]


def test_with_two_slots_only_the_first_load_and_the_last_gradient_show():
    step, _ = simulate(tiny_model(), Durations(kernel=10, fetch=4, drain=3))
    assert totals(step) == {"arithmetic": WORK, "link": 4 + 3}
    assert lane(step, "compute", Cause.link) == [("weights", 0), ("last gradient", None)]


def test_with_one_slot_every_load_shows():
    step, _ = simulate(tiny_model(), Durations(kernel=10, fetch=4, drain=3), weight_slots=1)
    assert totals(step) == {"arithmetic": WORK, "link": 9 * 4 + 3}


def test_each_visit_is_one_bar_and_so_is_each_copy():
    step, _ = simulate(tiny_model(), Durations(), offloaded=(3,))
    assert lane(step, "compute", Cause.arithmetic) == [*FORWARD, ("head", 4), *BACKWARD]
    up, down = [("weights", b) for b in (0, 1, 2, 3, 4, 2)], [("weights", b) for b in (1, 0)]
    assert lane(step, "H2D") == [*up, ("boundary", 3), *down]
    drains = [("gradient", b) for b in (4, 3, 2, 1, 0)]
    assert lane(step, "D2H") == [("boundary", 3), *drains]
    layer = tiny_model().layouts[1]
    by_name = {(s.lane, s.what, s.block): s for s in step.spans}
    assert by_name["H2D", "weights", 1].num_bytes == 2 * layer.num_elements
    assert by_name["D2H", "gradient", 1].num_bytes == 2 * layer.num_trainable
    assert by_name["D2H", "boundary", 3].num_bytes == by_name["H2D", "boundary", 3].num_bytes == 2 * 2 * 5 * 32
    assert {s.seconds for s in step.lane("H2D")} == {4} and {s.seconds for s in step.lane("D2H")} == {3}


def test_blocks_in_hbm_cross_no_link():
    step, _ = simulate(tiny_model(), Durations(kernel=10, fetch=4, drain=3), in_hbm={0, 1, 2})
    assert lane(step, "H2D") == [("weights", 3), ("weights", 4)]
    assert lane(step, "D2H") == [("gradient", 4), ("gradient", 3)]
    assert totals(step) == {"arithmetic": WORK}
    step, _ = simulate(tiny_model(), Durations(kernel=10, published={0: 30}), in_hbm={0, 1, 2, 3, 4})
    assert totals(step) == {"arithmetic": WORK, "optimizer": 30}


def test_a_load_that_had_to_wait_for_its_update_is_the_optimizers_fault():
    late = {block: 20 * (block + 1) for block in range(5)}
    step, _ = simulate(tiny_model(), Durations(kernel=10, fetch=4, drain=3, published=late))
    # Block 0 is there at 20 and loaded at 24; each later one is computed 20 after the one before, which takes 10.
    assert totals(step) == {"arithmetic": WORK, "optimizer": 24 + 4 * 10, "link": 3}


def test_an_update_that_is_done_in_time_costs_nothing():
    early = {block: 5 * block for block in range(5)}
    step, _ = simulate(tiny_model(), Durations(kernel=10, fetch=4, drain=3, published=early))
    assert totals(step) == {"arithmetic": WORK, "link": 4 + 3}


def test_a_gradient_buffer_that_is_not_given_back_is_the_optimizers_fault_as_far_as_it_shows():
    step, _ = simulate(tiny_model(), Durations(kernel=10, fetch=4, drain=3, buffers={3: 110, 2: 111}))
    # The head is done at 64 and layer 3 at 84, where the host waits; layer 2 follows 1 later, hidden by its kernels.
    assert totals(step) == {"arithmetic": WORK, "link": 4 + 3, "optimizer": 110 - 84}


def test_slow_drains_and_boundaries_show_as_link():
    step, _ = simulate(tiny_model(), Durations(kernel=10, fetch=1, drain=100))
    waits = lane(step, "compute", Cause.link)
    assert ("gradient slot", 2) in waits and ("gradient slot", 3) not in waits  # two slots
    step, _ = simulate(tiny_model(), Durations(kernel=10, fetch=30, drain=1), offloaded=(2, 3))
    waits = lane(step, "compute", Cause.link)
    assert ("boundary", 3) in waits


def test_the_callers_time_is_data_and_nothing_of_it_is_hidden():
    step, _ = simulate(tiny_model(), Durations(kernel=10, fetch=4, drain=3, data=50))
    assert totals(step) == {"arithmetic": WORK, "link": 4 + 3, "data": 50}


def test_a_host_that_issues_more_slowly_than_the_device_computes_is_seen():
    ahead, _ = simulate(tiny_model(), Durations(kernel=10, fetch=4, drain=3))
    assert sum(s.paced for s in ahead.lane("compute")) == 0
    behind, _ = simulate(tiny_model(), Durations(kernel=0, fetch=0, drain=0, issue=30))
    arithmetic = [s for s in behind.lane("compute") if s.cause is Cause.arithmetic]
    # Between visits it issues 8 loads; inside them 13 kernels and 5 gradients.
    assert totals(behind) == {"launch": 8 * 30, "arithmetic": 18 * 30}
    assert sum(s.paced for s in arithmetic) == sum(s.seconds for s in arithmetic)


duration = st.integers(0, 40)
times = st.dictionaries(st.integers(0, 4), st.integers(0, 300))


@given(
    st.builds(Durations, st.integers(1, 40), duration, duration, st.integers(0, 15), duration, times, times),
    st.integers(1, 3),
    st.sampled_from([(), (3,), (1, 2, 3)]),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_every_second_of_compute_belongs_to_one_cause(durations, weight_slots, offloaded, accumulates):
    step, _ = simulate(
        tiny_model(), durations, weight_slots=weight_slots, num_micro_batches=2, offloaded=offloaded,
        old_share=0.5 * accumulates,
    )  # fmt: skip
    for name in ("compute", "host"):
        spans = step.lane(name)
        assert spans[0].start == step.start and spans[-1].end == step.end
        assert all(before.end == after.start for before, after in pairwise(spans))
        assert all(s.seconds > 0 and s.cause is not None and s.paced <= s.seconds for s in spans)
    assert sum(totals(step).values()) == step.end - step.start
    assert totals(step).get("arithmetic", 0) >= durations.kernel * WORK / 10 * 2
    for name in ("H2D", "D2H"):  # a stream does one thing at a time
        spans = step.lane(name)
        assert all(before.end <= after.start for before, after in pairwise(spans))


SCENARIOS = (
    {"model": lambda: tiny_model(), "offloaded": (1, 2, 3)},
    {"model": lambda: tiny_model(layers=1, tied=True), "num_micro_batches": 2, "old_share": 0.5},
)


def test_every_wait_of_compute_has_a_cause():
    sites = {}
    for scenario in SCENARIOS:
        _, streams = simulate(scenario["model"](), Durations(), **{k: v for k, v in scenario.items() if k != "model"})
        sites |= streams.compute.sites
    assert {cause for cause in sites.values()} <= {Cause.link, Cause.optimizer, Cause.data}
    source, first = inspect.getsourcelines(gradients.GradientSlots.rehearse)  # measures between steps
    rehearsal = {("gradients.py", number) for number in range(first, first + len(source))}
    in_the_code = {
        (module.__file__.rpartition("/")[2], number)
        for module in (slots, gradients, boundaries, executor)
        for number, line in enumerate(inspect.getsource(module).splitlines(), start=1)
        if "compute.wait_event(" in line
    }
    assert {(file, line) for file, _, line in sites} == in_the_code - rehearsal


# ---- the recorder by itself


class CountingClock(HostClock):
    def __init__(self):
        self.points = 0

    def point(self, stream):
        self.points += 1
        return super().point(stream)

    anchor = point


def use(recorder):
    recorder.enter(Cause.arithmetic, "forward", 0)
    with recorder.during(Cause.link, "weights", 0), recorder.transfer("H2D", None, "weights", 0):
        recorder.count("H2D", 5)
    with recorder.update(0, 7):
        pass
    recorder.end_step()


def test_nothing_is_taken_while_nothing_is_recorded():
    clock = CountingClock()
    recorder = Timeline(clock)
    use(recorder)
    assert clock.points == 0 and not recorder.recording and recorder.stop() == []
    recorder.start(None)
    use(recorder)
    assert clock.points > 0 and recorder.recording
    assert len(recorder.stop()) == 1
    points = clock.points
    use(recorder)
    assert clock.points == points and recorder.stop() == []


@pytest.mark.parametrize(
    ("waited", "expected"),
    [
        (2, [("forward", 24), ("backward", 10)]),
        (3, [("forward", 10), ("weights", 3), ("forward", 10), ("issuing", 3), ("backward", 10)]),
    ],
)
def test_a_wait_that_cannot_be_told_from_none_belongs_to_what_came_before(waited, expected):
    clock = SimulatedClock()
    clock.resolution = 2
    recorder = Timeline(clock)
    recorder.start(SimulatedStream(clock))
    recorder.enter(Cause.arithmetic, "forward", 0)
    clock.host += 10
    with recorder.during(Cause.link, "weights", 0):
        clock.host += waited
    clock.host += 10
    recorder.enter(Cause.launch, "issuing")
    clock.host += waited
    recorder.enter(Cause.arithmetic, "backward", 0)
    clock.host += 10
    recorder.end_step()
    (step,) = recorder.stop()
    assert [(s.what, s.seconds) for s in step.lane("compute")] == expected


def test_a_mark_is_issued_before_the_device_gets_there():
    """Also where taking the point holds the host up: what is waiting to be issued is the host's delay."""

    class Slow(SimulatedClock):
        def point(self, stream):
            reached = super().point(stream)
            self.host += 3
            return reached

    clock = Slow()
    recorder = Timeline(clock)
    recorder.start(SimulatedStream(clock))
    recorder.enter(Cause.arithmetic, "forward", 0)
    assert all(mark.host <= mark.point for mark in recorder._record.steps[0].marks)


def test_what_was_not_finished_is_left_out():
    recorder = Timeline()
    recorder.start(None)
    recorder.enter(Cause.arithmetic, "forward", 0)
    assert recorder.stop() == []
    recorder.start(None)
    use(recorder)
    recorder.enter(Cause.arithmetic, "backward", 0)
    (step,) = recorder.stop()
    assert "backward" not in {span.what for span in step.spans}


def test_two_recordings_at_once_are_refused_and_one_may_be_dropped():
    recorder = Timeline()
    recorder.start(None)
    with pytest.raises(HorizonError, match="steps are being recorded already"):
        recorder.start(None)
    recorder.forget()
    recorder.start(None)


def test_a_failure_in_a_wait_leaves_what_was_before():
    recorder = Timeline()
    recorder.start(None)
    recorder.enter(Cause.arithmetic, "forward", 1)
    with pytest.raises(KeyError), recorder.during(Cause.optimizer, "update", 1):
        raise KeyError
    recorder.end_step()
    (step,) = recorder.stop()
    assert lane(step, "compute")[-2:] == [("update", 1), ("forward", 1)]


def test_each_update_thread_has_its_lane():
    recorder = Timeline()
    recorder.start(None)

    def work():
        with recorder.update(3, 100):
            pass

    for number in range(2):
        thread = threading.Thread(target=work, name=f"horizon-update-{number}")
        thread.start()
        thread.join()
    recorder.end_step()
    (step,) = recorder.stop()
    for number in range(2):
        (span,) = step.lane(f"update {number}")
        assert (span.what, span.block, span.num_bytes, span.cause) == ("update", 3, 100, None)


@given(st.lists(st.floats(-5, 15), min_size=1))
def test_times_of_two_clocks_are_put_in_order(times):
    found = timeline._increasing(times, 0.0, 10.0)
    assert found[0] == 0.0 and found[-1] == 10.0 and found == sorted(found)
    assert len(found) == len(times) + 1
    if times == sorted(times) and times[0] == 0 and times[-1] <= 10:
        assert found == [*times, 10.0]


# ---- the engine

SHAPE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4,
}  # fmt: skip
BATCH = {"input_ids": torch.arange(32).view(2, 16), "labels": torch.arange(32).view(2, 16)}


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_an_engines_steps_on_cpu(max_grad_norm):
    with horizon.Engine.from_config(SHAPE, device="cpu", max_grad_norm=max_grad_norm, self_check=False) as engine:
        engine.step(BATCH)
        with engine.trace() as recording:
            assert recording.steps == ()
            for _ in range(2):
                engine.step(BATCH)
        engine.step(BATCH)
    assert len(recording.steps) == 2
    assert recording.steps[0].end == recording.steps[1].start
    for step in recording.steps:
        assert lane(step, "compute", Cause.arithmetic)[0] == ("forward", 0)
        visits = dict.fromkeys(lane(step, "compute", Cause.arithmetic))
        assert list(visits) == [*FORWARD, ("head", 4), *BACKWARD]
        assert sum(s.seconds for s in step.lane("compute")) == pytest.approx(step.end - step.start)
        assert ("last gradient", None) in lane(step, "compute", Cause.link)
        assert lane(step, "H2D") == [("weights", b) for b in (0, 1, 2, 3, 4, 2, 1, 0)]
        assert lane(step, "D2H") == [("gradient", b) for b in (4, 3, 2, 1, 0)]
    updated = {s.block for step in recording.steps for s in step.spans if s.lane.startswith("update")}
    assert updated == {0, 1, 2, 3, 4}


def test_a_forward_that_overtakes_the_update_waits_for_it_and_says_so(monkeypatch):
    with horizon.Engine.from_config(SHAPE, device="cpu", self_check=False) as engine:
        engine.step(BATCH)
        updater = engine._runtime._updater
        update = updater._update
        monkeypatch.setattr(updater, "_update", lambda *arrays: (time.sleep(0.01), update(*arrays)))
        engine.step(BATCH)
        with engine.trace() as recording:
            engine.step(BATCH)
    (step,) = recording.steps
    waits = [s for s in step.lane("compute") if s.what == "update"]
    assert {s.block for s in waits} >= {1, 2, 3} and {s.cause for s in waits} == {Cause.optimizer}
    for block in (1, 2, 3):  # waited for until its last chunk is done
        done = max(s.end for s in step.spans if s.lane.startswith("update") and s.block == block)
        assert done <= max(s.end for s in waits if s.block == block)
    assert recording.split.optimizer_ms > 0


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_updates_of_blocks_in_hbm_are_computes_own_or_beside_it(max_grad_norm):
    memory = horizon.MemoryConfig(policy="hbm_first", hbm_blocks=2)
    settings = {"memory": memory, "max_grad_norm": max_grad_norm, "device": "cpu", "self_check": False}
    with horizon.Engine.from_config(SHAPE, **settings) as engine:
        engine.step(BATCH)
        in_hbm = set(engine._runtime.store.in_hbm)
        with engine.trace() as recording:
            engine.step(BATCH), engine.step(BATCH)
    assert len(in_hbm) == 2
    step, split = recording.steps[0], recording.split
    by_compute = {s.block for s in step.lane("compute") if s.what == "HBM update"}
    beside = {s.block for s in step.lane("HBM update")}
    assert (by_compute, beside) == ((in_hbm, set()) if max_grad_norm else (set(), in_hbm))
    assert (split.hbm_update_ms > 0) is bool(max_grad_norm) and split.hbm_update_ms <= split.optimizer_ms
    assert (
        {s.block for s in step.lane("H2D")} | in_hbm == {0, 1, 2, 3, 4} == {s.block for s in step.lane("D2H")} | in_hbm
    )
    assert split.update_threads == len({s.lane for t in recording.steps for s in t.spans if s.lane[:7] == "update "})
