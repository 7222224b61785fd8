"""No two streams touch the same bytes unordered, and every wait is needed for that: without it, a race is found."""

import inspect

import pytest
import torch

from horizon.config.schema import Recompute
from horizon.stream import boundaries, gradients, slots, turn
from tests.stream.steps import record_steps, tiny_model

FROZEN = ("model.embed_tokens.*", "model.layers.0.*")
SCENARIOS = {
    "two steps": lambda: {"model": tiny_model(layers=2), "old_shares": (0.0, 0.0)},
    "offloaded, two micro-batches": lambda: {
        "model": tiny_model(layers=2),
        "num_micro_batches": 2,
        "offloaded": (1, 2),
        "old_shares": (0.0, 0.0),
    },
    "tied, accumulating, fp32": lambda: {
        "model": tiny_model(layers=2, tied=True),
        "num_micro_batches": 2,
        "compute_dtype": torch.float32,
        "old_shares": (0.0, 0.5),
    },
    "tied, accumulating, bf16, four drain slots": lambda: {
        "model": tiny_model(layers=2, tied=True),
        "grad_dtype": torch.bfloat16,
        "drain_slots": 4,
        "old_shares": (0.0, 0.5),
    },
    "graphs and linear outputs kept": lambda: {
        "model": tiny_model(layers=3),
        "num_micro_batches": 2,
        "offloaded": (1, 2),
        "recompute": {2: Recompute.selective, 3: Recompute.none},
        "old_shares": (0.0, 0.0),
    },
    "the embedding in HBM, a tied head that borrows it": lambda: {
        "model": tiny_model(layers=2, tied=True),
        "in_hbm": {0},
        "old_shares": (0.0, 0.5, 0.0),
    },
    "some blocks in HBM, offloaded, a graph kept": lambda: {
        "model": tiny_model(layers=3),
        "num_micro_batches": 2,
        "grad_dtype": torch.bfloat16,
        "in_hbm": {0, 1, 3},
        "offloaded": (1, 2),
        "recompute": {3: Recompute.none},
        "old_shares": (0.0, 0.5),
    },
    "all in HBM, tied, fp32": lambda: {
        "model": tiny_model(layers=2, tied=True),
        "compute_dtype": torch.float32,
        "in_hbm": {0, 1, 2, 3},
        "old_shares": (0.0, 0.5),
    },
    "two layers at the turn, accumulating, bf16": lambda: {
        "model": tiny_model(layers=3),
        "num_micro_batches": 2,
        "grad_dtype": torch.bfloat16,
        "offloaded": (1,),
        "turn_layers": 2,
        "old_shares": (0.0, 0.5),
    },
    "all layers at the turn, one in HBM, tied, accumulating, fp32": lambda: {
        "model": tiny_model(layers=3, tied=True),
        "num_micro_batches": 2,
        "in_hbm": {0, 2},
        "turn_layers": 3,
        "old_shares": (0.0, 0.5),
    },
    "one slot, frozen blocks": lambda: {
        "model": tiny_model(layers=2, freeze=FROZEN),
        "weight_slots": 1,
        "offloaded": (1, 2),
    },
}


def waits(module):
    """(file, function, line) of every wait_event in a module -> the line's text."""
    lines = inspect.getsource(module).splitlines()
    found, function = {}, ""
    for number, line in enumerate(lines, start=1):
        if line.lstrip().startswith("def "):
            function = line.split("def ")[1].split("(")[0]
        if ".wait_event(" in line:
            found[module.__file__.rpartition("/")[2], function, number] = line
    return found


SITES = waits(slots) | waits(gradients) | waits(boundaries) | waits(turn)
SITES = {site: line for site, line in SITES.items() if site[1] != "rehearse"}  # measures between steps
# Before a boundary returns, compute has waited for its copy to the host, and fetch waits for compute.
IMPLIED = [site for site, line in SITES.items() if site[1] == "_bring_back" and "saved" in line]


@pytest.mark.parametrize("name", SCENARIOS)
def test_unordered_streams_never_touch_the_same_bytes(name):
    recorder = record_steps(**SCENARIOS[name]())
    assert recorder.races == []
    assert recorder.sites <= SITES.keys()


@pytest.mark.parametrize("site", [s for s in SITES if s not in IMPLIED], ids=lambda site: f"{site[1]}:{site[2]}")
def test_forgetting_a_wait_is_a_race(site):
    assert any(record_steps(**settings(), dropped=site).races for settings in SCENARIOS.values())
