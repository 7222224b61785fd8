"""Memory that the system refuses, or that an engine has used: all of it goes back."""

import ctypes
import errno
import gc
import mmap
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from horizon import AdamW
from horizon.errors import BudgetError, CheckpointError
from horizon.optim.rate import measure_rates
from horizon.optim.threads import default_num_threads
from horizon.plan.cxl import NO_CXL
from horizon.plan.machine import process_bytes
from horizon.store import arena
from horizon.store.host import HostStore

MIB = 1 << 20


@pytest.fixture
def mappings(monkeypatch):
    """Counts mappings from now on, and those that are left; the one of number `refuse`, from 1, is refused."""
    made = SimpleNamespace(number=0, refuse=0, alive=weakref.WeakSet())

    def map_memory(*args, **kwargs):
        made.number += 1
        if made.number == made.refuse:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        mapping = mmap.mmap(*args, **kwargs)
        made.alive.add(mapping)
        return mapping

    def left():
        gc.collect()  # an error's traceback holds the frames it went through
        return len(made.alive)

    for adamw in (AdamW(), AdamW(moments="int8")):  # what is tried on the machine once per process maps memory, too
        measure_rates(torch.device("cpu"), default_num_threads(), torch.float32, adamw, NO_CXL)
    made.left = left
    monkeypatch.setattr(arena, "mmap", SimpleNamespace(**{**vars(mmap), "mmap": map_memory}))
    return made


@pytest.mark.parametrize(
    ("number", "purpose"), [(1, "weights"), (2, "residual"), (3, "exp_avg"), (4, "exp_avg_sq"), (5, "grads")]
)
@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_memory_that_is_refused_while_building_gives_back_what_came_before(
    build, fails, mappings, number, purpose, max_grad_norm
):
    mappings.refuse = number
    with fails(BudgetError, rf"the system refuses .* of host memory for {purpose} \(Cannot allocate memory\)"):
        build(max_grad_norm=max_grad_norm, self_check=False)
    assert (mappings.number, mappings.left()) == (number, 0)


@pytest.mark.parametrize(("number", "purpose"), [(4, "exp_avg_sq"), (6, "exp_avg_sq_scale"), (7, "grads")])
def test_memory_that_is_refused_for_int8_moments(build, fails, mappings, number, purpose):
    mappings.refuse = number
    with fails(BudgetError, rf"the system refuses .* of host memory for {purpose} \("):
        build(optimizer=AdamW(moments="int8"), self_check=False)
    assert (mappings.number, mappings.left()) == (number, 0)


def test_memory_that_is_refused_for_adding_gradients_up_ends_the_run(build, fails, tools, mappings):
    engine = build(max_grad_norm=None, self_check=False)
    engine.step(tools.make_batch(0))
    mappings.refuse = mappings.number + 1
    for call in (lambda: engine.forward_backward(tools.make_batch(0)), lambda: engine.step(tools.make_batch(0))):
        with fails(BudgetError, "host memory for grads"):
            call()
    engine.close()
    assert mappings.left() == 0


def test_an_engine_unmaps_all_it_has_mapped(build, tools, mappings):
    engine = build(max_grad_norm=None, self_check=False)
    engine.forward_backward(tools.make_batch(0))  # its gradients replace the ring
    engine.optimizer_step()
    assert (mappings.number, mappings.left()) == (6, 5)
    engine.close()
    assert mappings.left() == 0


@pytest.fixture
def large(tools):
    """5.2 M parameters: 84 MB of states and gradients."""
    return {**tools.LLAMA, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}


def grown(work, times=3):
    """Resident bytes that `work` adds each time, once everything it loads and caches is there."""
    work()
    before = held_bytes()
    for _ in range(times):
        work()
    return (held_bytes() - before) / times


def held_bytes():
    """Resident bytes without what only the C library keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return process_bytes()


def test_resident_memory_comes_back_after_closing(build, tools, large):
    used = []

    def work():
        with build(large) as engine:
            engine.step(tools.make_batch(0))
            engine.evaluate(tools.make_batch(0))
            used.append(sum(engine._runtime.store.num_bytes.values()))

    assert grown(work) < 4 * MIB
    assert used[0] > 50 * MIB


def test_resident_memory_comes_back_after_a_load_that_fails_near_its_end(build, fails, large, monkeypatch):
    model, write, names = AutoModelForCausalLM.from_config(AutoConfig.for_model(**large)), HostStore.write_master, []

    def fail_at_the_head(store, name, value):
        names.append(name)
        if name == "lm_head.weight":
            raise CheckpointError("the disk is gone")
        write(store, name, value)

    monkeypatch.setattr(HostStore, "write_master", fail_at_the_head)

    def work():
        names.clear()
        with fails(CheckpointError, "the disk is gone"):
            build(model)

    assert grown(work) < 4 * MIB
    assert len(names) == 21
