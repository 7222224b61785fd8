"""No two streams touch the same bytes unordered, and every wait is needed for that; the order of a walk, as a text."""

import inspect

import pytest
import torch

import horizon
from horizon.models.blocks import BlockModel
from horizon.models.skeleton import skeleton_from_instance
from horizon.stream.batch import to_micro_batches
from horizon.zo import executor, slots
from horizon.zo.copies import Copies
from horizon.zo.estimator import History, StepRecord
from horizon.zo.executor import ForwardExecutor
from horizon.zo.masters import Masters, states_of
from horizon.zo.slots import MasterSlots
from tests.parity.reference import build, plain
from tests.stream.recorder import RecordedStreams, Recorder
from tests.zo.reference import PlainPerturber, counter_noise


def record_walks(*, tied=False, num_slots=3, every=1, num_steps=3, layers=3, queries=1, flush=True, dropped=None):
    """The recorder of some steps, and of a flush at their end."""
    recorder = Recorder(dropped)
    model = build("llama", num_hidden_layers=layers, tie_word_embeddings=tied)
    settings = horizon.ZerothOrder(lr=1e-2, queries=queries, writeback_every=every)
    blocks = BlockModel(skeleton_from_instance(model))
    masters, streams, history = (
        Masters(blocks.layouts, settings, pin=False),
        RecordedStreams(recorder),
        History(settings),
    )
    for name, parameter in model.named_parameters():
        masters.write_master(name, parameter)
    for layout in blocks.layouts:
        for state in masters.states[layout.index]:
            recorder.name(state, layout.name)

    def make(numel):
        return tuple(streams.empty(numel, dtype=state.dtype) for state in states_of(settings))

    copies = Copies(streams, blocks.layouts, torch.float32)
    perturber = PlainPerturber(blocks.layouts, settings, counter_noise(blocks.layouts, 0))
    run = ForwardExecutor(
        blocks, MasterSlots(streams, masters, num_slots, make), copies, Labelled(perturber, recorder, blocks.layouts),
        history, streams, 1 << 20, every,
    )  # fmt: skip
    batches = to_micro_batches(plain(0), torch.device("cpu"), blocks.vocab_size)
    with recorder:
        for step in range(1, num_steps + 1):
            recorder.log.append(f"step {step}")
            losses = run.losses(batches, queries, None)
            history.append(StepRecord(step, 0, tuple((losses[::2] - losses[1::2]).tolist()), 1e-2))
        if flush:
            recorder.log.append("flush")
            run.flush()
    return recorder


class Labelled:
    """Names what compute is doing in the recorder's log."""

    def __init__(self, perturber, recorder, layouts):
        self._perturber, self._recorder, self._layouts = perturber, recorder, layouts
        self.begin = perturber.begin

    def __call__(self, block, states, copies, query, updates):
        what = " and ".join(["update"] * updates + ["copy"] * bool(copies))
        self._recorder.label("compute", f"{what} {self._layouts[block].name}")
        self._perturber(block, states, copies, query, updates)


SCENARIOS = {
    "three steps": {},
    "tied": {"tied": True},
    "one slot": {"num_slots": 1},
    "two slots, two queries": {"num_slots": 2, "queries": 2},
    "more slots than blocks": {"num_slots": 8, "layers": 1, "tied": True},
    "written back every second step": {"every": 2, "num_steps": 5},
}


def waits(module):
    """(file, function, line) of every wait_event in a module."""
    found, function = set(), ""
    for number, line in enumerate(inspect.getsource(module).splitlines(), start=1):
        if line.lstrip().startswith("def "):
            function = line.split("def ")[1].split("(")[0]
        if ".wait_event(" in line:
            found.add((module.__file__.rpartition("/")[2], function, number))
    return found


SITES = waits(slots) | waits(executor)


@pytest.mark.parametrize("name", SCENARIOS)
def test_unordered_streams_never_touch_the_same_bytes(name):
    recorder = record_walks(**SCENARIOS[name])
    assert recorder.races == []
    assert recorder.sites <= SITES


@pytest.mark.parametrize("site", sorted(SITES), ids=lambda site: f"{site[1]}:{site[2]}")
def test_forgetting_a_wait_is_a_race(site):
    assert any(record_walks(**scenario, dropped=site).races for scenario in SCENARIOS.values())


SECOND_STEP = """
step 2
fetch     waits for compute: copy head
fetch   load layers.1
compute   waits for fetch: load embed
compute update and copy embed
drain     waits for compute: update and copy embed
drain   drain embed
fetch     waits for drain: drain embed
fetch   load layers.2
compute   waits for fetch: load layers.0
compute update and copy layers.0
drain     waits for compute: update and copy layers.0
drain   drain layers.0
fetch     waits for drain: drain layers.0
fetch   load head
compute   waits for fetch: load layers.1
compute update and copy layers.1
drain     waits for compute: update and copy layers.1
drain   drain layers.1
fetch     waits for drain: drain layers.1
fetch   load embed
compute   waits for fetch: load layers.2
compute update and copy layers.2
drain     waits for compute: update and copy layers.2
drain   drain layers.2
fetch     waits for drain: drain layers.2
fetch   load layers.0
compute   waits for fetch: load head
compute update and copy head
drain     waits for compute: update and copy head
drain   drain head
"""


def test_a_step_loads_every_block_once_and_all_but_one_slot_for_the_next():
    log = record_walks(num_steps=2, flush=False).log
    shortened = [line.replace("weights ", "") for line in log[log.index("step 2") :]]
    halves = [line for i, line in enumerate(shortened) if i == 0 or line != shortened[i - 1]]  # a master has two
    assert "\n".join(halves) == SECOND_STEP.strip()


def test_a_tied_embedding_goes_up_once_and_down_when_it_is_asked_for():
    log = record_walks(tied=True, num_steps=4).log
    assert sum(line.startswith("fetch   load embed") for line in log) == 2  # both halves
    assert [line for line in log[: log.index("flush")] if "drain embed" in line] == []
    assert sum(line.startswith("drain   drain embed") for line in log[log.index("flush") :]) == 2
