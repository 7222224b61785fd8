"""What a step does, in which order, and what waits for what: the log of a whole step reads as the specification."""

import pytest

from tests.stream.steps import record_steps, tiny_model

ONE_MICRO_BATCH = """
fetch   load weights embed
fetch   load weights layers.0
compute   waits for fetch: load weights embed
compute forward embed m0
fetch     waits for compute: forward embed m0
fetch   load weights layers.1
compute   waits for fetch: load weights layers.0
compute forward layers.0 m0
fetch     waits for compute: forward layers.0 m0
fetch   load weights layers.2
compute   waits for fetch: load weights layers.1
compute forward layers.1 m0
fetch     waits for compute: forward layers.1 m0
fetch   load weights head
compute   waits for fetch: load weights layers.2
compute forward layers.2 m0
compute   waits for fetch: load weights head
compute forward head m0
compute backward head m0
drain     waits for compute: backward head m0
drain   drain loss
drain     waits for compute: backward head m0
drain   drain norms
drain   drain gradient head
fetch     waits for compute: backward head m0
fetch   load weights layers.1
compute   waits for fetch: load weights layers.2
compute recompute layers.2 m0
compute backward layers.2 m0
drain     waits for compute: backward layers.2 m0
drain   drain norms
drain   drain gradient layers.2
fetch     waits for compute: backward layers.2 m0
fetch   load weights layers.0
compute   waits for fetch: load weights layers.1
compute   waits for drain: drain gradient head
compute recompute layers.1 m0
compute backward layers.1 m0
drain     waits for compute: backward layers.1 m0
drain   drain norms
drain   drain gradient layers.1
fetch     waits for compute: backward layers.1 m0
fetch   load weights embed
compute   waits for fetch: load weights layers.0
compute   waits for drain: drain gradient layers.2
compute recompute layers.0 m0
compute backward layers.0 m0
drain     waits for compute: backward layers.0 m0
drain   drain norms
drain   drain gradient layers.0
compute   waits for fetch: load weights embed
compute   waits for drain: drain gradient layers.1
compute backward embed m0
drain     waits for compute: backward embed m0
drain   drain norms
drain   drain gradient embed
"""

TWO_MICRO_BATCHES = """
fetch   load weights embed
fetch   load weights layers.0
compute   waits for fetch: load weights embed
compute forward embed m0
compute forward embed m1
fetch     waits for compute: forward embed m1
fetch   load weights layers.1
compute   waits for fetch: load weights layers.0
compute forward layers.0 m0
compute forward layers.0 m1
fetch     waits for compute: forward layers.0 m1
fetch   load weights layers.2
compute   waits for fetch: load weights layers.1
compute forward layers.1 m0
compute forward layers.1 m1
fetch     waits for compute: forward layers.1 m1
fetch   load weights head
compute   waits for fetch: load weights layers.2
compute forward layers.2 m0
compute forward layers.2 m1
compute   waits for fetch: load weights head
compute forward head m0
compute backward head m0
compute forward head m1
compute backward head m1
drain     waits for compute: backward head m1
drain   drain loss
drain     waits for compute: backward head m1
drain   drain norms
drain   drain gradient head
fetch     waits for compute: backward head m1
fetch   load weights layers.1
compute   waits for fetch: load weights layers.2
compute recompute layers.2 m0
compute backward layers.2 m0
compute recompute layers.2 m1
compute backward layers.2 m1
drain     waits for compute: backward layers.2 m1
drain   drain norms
drain   drain gradient layers.2
fetch     waits for compute: backward layers.2 m1
fetch   load weights layers.0
compute   waits for fetch: load weights layers.1
compute   waits for drain: drain gradient head
compute recompute layers.1 m0
compute backward layers.1 m0
compute recompute layers.1 m1
compute backward layers.1 m1
drain     waits for compute: backward layers.1 m1
drain   drain norms
drain   drain gradient layers.1
fetch     waits for compute: backward layers.1 m1
fetch   load weights embed
compute   waits for fetch: load weights layers.0
compute   waits for drain: drain gradient layers.2
compute recompute layers.0 m0
compute backward layers.0 m0
compute recompute layers.0 m1
compute backward layers.0 m1
drain     waits for compute: backward layers.0 m1
drain   drain norms
drain   drain gradient layers.0
compute   waits for fetch: load weights embed
compute   waits for drain: drain gradient layers.1
compute backward embed m0
compute backward embed m1
drain     waits for compute: backward embed m1
drain   drain norms
drain   drain gradient embed
"""

TIED_ONE_LAYER = """
fetch   load weights embed
fetch   load weights layers.0
compute   waits for fetch: load weights embed
compute forward embed m0
fetch     waits for compute: forward embed m0
fetch   load weights head
fetch   load weights embed
compute   waits for fetch: load weights layers.0
compute forward layers.0 m0
compute   waits for fetch: load weights embed
compute forward head m0
compute backward head m0
drain     waits for compute: backward head m0
drain   drain loss
drain     waits for compute: backward head m0
drain   drain norms
drain   drain gradient head
drain   drain gradient embed
fetch     waits for compute: backward head m0
fetch   load weights embed
compute   waits for fetch: load weights layers.0
compute recompute layers.0 m0
compute backward layers.0 m0
drain     waits for compute: backward layers.0 m0
drain   drain norms
drain   drain gradient layers.0
compute   waits for fetch: load weights embed
compute   waits for drain: drain gradient embed
fetch     waits for compute: backward layers.0 m0
fetch     waits for drain: drain gradient embed
fetch   load gradient embed
compute   waits for fetch: load gradient embed
compute backward embed m0
drain     waits for compute: backward embed m0
drain   drain norms
drain   drain gradient embed
drain   drain gradient embed
"""


@pytest.mark.parametrize(
    ("expected", "layers", "tied", "num_micro_batches"),
    [(ONE_MICRO_BATCH, 3, False, 1), (TWO_MICRO_BATCHES, 3, False, 2), (TIED_ONE_LAYER, 1, True, 1)],
    ids=["one micro-batch", "two micro-batches", "tied embeddings"],
)
def test_a_step_does_this_in_this_order(expected, layers, tied, num_micro_batches):
    recorder = record_steps(model=tiny_model(layers, tied), num_micro_batches=num_micro_batches)
    assert recorder.log == expected.strip().splitlines()


@pytest.mark.parametrize("num_micro_batches", [1, 3])
@pytest.mark.parametrize(
    ("weight_slots", "expected"),
    [
        (1, "embed layers.0 layers.1 layers.2 head layers.2 layers.1 layers.0 embed"),
        (2, "embed layers.0 layers.1 layers.2 head layers.1 layers.0 embed"),  # the last layer is still there
        (3, "embed layers.0 layers.1 layers.2 head layers.0 embed"),
        (4, "embed layers.0 layers.1 layers.2 head embed"),
        (5, "embed layers.0 layers.1 layers.2 head"),
    ],
)
def test_weights_cross_the_link_once_per_pass_and_not_at_all_where_they_are_still_in_a_slot(
    weight_slots, expected, num_micro_batches
):
    recorder = record_steps(model=tiny_model(), weight_slots=weight_slots, num_micro_batches=num_micro_batches)
    prefix = "fetch   load weights "
    assert [line.removeprefix(prefix) for line in recorder.log if line.startswith(prefix)] == expected.split()


def test_a_new_version_is_loaded_again_even_where_the_block_is_still_in_a_slot():
    recorder = record_steps(model=tiny_model(layers=1), weight_slots=3, old_shares=(0.0, 0.0))
    loads = [line.split()[-1] for line in recorder.log if line.startswith("fetch   load")]
    assert loads == ["embed", "layers.0", "head"] * 2


def test_backward_ends_at_the_first_block_that_has_something_to_train():
    model = tiny_model(layers=3, freeze=("model.embed_tokens.*", "model.layers.0.*"))
    log = record_steps(model=model).log
    assert log[-1] == "drain   drain gradient layers.1"
    assert [line for line in log if "recompute" in line] == [
        "compute recompute layers.2 m0",
        "compute recompute layers.1 m0",
    ]


def test_every_event_has_a_waiter_but_the_last_release_of_each_slot():
    recorder = record_steps(model=tiny_model(), num_micro_batches=2, offloaded=(1, 2))
    unwaited = [f"{event.stream} {event.after}" for event in recorder.events if not event.waiters]
    assert unwaited == [
        "compute forward layers.2 m1",  # the last layer stays in its slot for backward,
        "compute backward layers.0 m1",  # where another release follows before the slot is loaded again
        "compute backward embed m1",
    ]
