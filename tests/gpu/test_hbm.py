"""Blocks whose states live in device memory: updated there bit for bit as on the host, within what was planned."""

import sys
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

import horizon
from horizon.config.schema import Moments
from horizon.errors import NonFiniteError
from horizon.layout import ParamSpec, place_block
from horizon.optim.adamw import AdamW, step_scalars
from horizon.optim.device import StateTensors, load_device_update
from horizon.plan.states import MASTER, MOMENTS, num_bytes
from horizon.store.split import split_master
from horizon.units import MIB
from tests.gpu.models import DEVICE, EAGER, batches, build, differing, engine
from tests.gpu.test_no_sync import watch

pytestmark = pytest.mark.gpu

CPU, GPU = torch.device("cpu"), torch.device(DEVICE, 0)
VOCAB, TOKENS = 2048, 512
MEDIUM = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": TOKENS,
}  # fmt: skip
CYCLES = 40_000_000  # about twenty milliseconds


def placed(num_blocks, **settings):
    return horizon.MemoryConfig(hbm_blocks=num_blocks, **settings)


# ---- the kernel


def states(layout, grad_dtype):
    """Masters, moments and gradients from 1e-42 to 1e4 in size, zeros and both signs among them; padding is zero."""
    generator = torch.Generator().manual_seed(0)

    def wide(numel):
        sizes = 10 ** (46 * torch.rand(numel, generator=generator) - 42)
        return sizes * torch.randint(-1, 2, (numel,), generator=generator)

    masters, moments = torch.zeros(layout.num_elements), torch.zeros(3, layout.num_trainable)
    for param in layout.params:
        span = slice(param.offset, param.end)
        masters[span] = wide(param.spec.numel)
        if param.spec.trainable:
            for row in moments:
                row[span] = wide(param.spec.numel)
    return StateTensors(*split_master(masters), moments[0], moments[1].abs(), moments[2].to(grad_dtype))


def bits(tensor):
    return tensor.cpu().view(torch.int16 if tensor.itemsize == 2 else torch.int32)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("eps", [1e-8, 1e-37])
@pytest.mark.parametrize("grad_scale", [1.0, 0.37])
def test_the_kernel_has_the_bits_of_the_hosts(grad_dtype, eps, grad_scale):
    specs = [
        ParamSpec("matrix", "matrix", (1000, 333)),
        ParamSpec("vector", "vector", (7,), decay=False),
        ParamSpec("odd", "odd", (129, 3)),
        ParamSpec("norm", "norm", (4096,), decay=False),
        ParamSpec("frozen", "frozen", (100,), False),
    ]
    layout, adamw = place_block(0, "b", specs), AdamW(eps=eps, weight_decay=0.1)
    expected, given = states(layout, grad_dtype), states(layout, grad_dtype)
    found = StateTensors(*(tensor.to(DEVICE) for tensor in given))
    host, device = (load_device_update(where, [layout]) for where in (CPU, GPU))
    for step in (1, 2, 3, 1000):
        scalars = [step_scalars(adamw, 1e-2, step, grad_scale, decay) for decay in (True, False)]
        host(0, expected, *scalars)
        device(0, found, *scalars)
        for name, one, other in zip(StateTensors._fields, expected, found, strict=True):
            different = int((bits(one) != bits(other)).sum())
            assert different == 0, f"{different} elements of {name} at step {step}"
    assert not torch.equal(bits(given.weights), bits(found.weights))


# ---- training


def train(model, memory, steps=3, **settings):
    """Losses and weights of steps that follow each other at once."""
    with engine(model, memory=memory, **settings) as streamed:
        losses = [streamed.step(batches(1 + step % 2, seed=step)).loss for step in range(steps)]
        return losses, dict(streamed.named_master_parameters())


@pytest.mark.parametrize("family", ["llama", "llama, tied"])
@pytest.mark.parametrize("clip", [0.5, None], ids=["kept", "ring"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("num_blocks", [1, 2, 4, 5])
def test_a_placement_changes_no_bit(family, clip, dtype, num_blocks):
    model = build(family, **EAGER)
    expected, weights = train(model, placed(0), max_grad_norm=clip, compute_dtype=dtype)
    found, moved_weights = train(model, placed(num_blocks), max_grad_norm=clip, compute_dtype=dtype)
    assert found == expected
    assert differing(moved_weights, weights) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_that_add_up_on_the_device(dtype):
    model, found = build("llama, tied", **EAGER), []
    for num_blocks in (0, 1, 5):
        with engine(model, memory=placed(num_blocks), compute_dtype=dtype) as streamed:
            for seed in range(3):
                streamed.forward_backward(batches(2, seed=seed))
            gradients = dict(streamed.named_gradients())
            streamed.optimizer_step()
            streamed.step(batches(seed=4))
            found.append((gradients, dict(streamed.named_master_parameters())))
    for gradients, weights in found[1:]:
        assert differing(gradients, found[0][0]) == []
        assert differing(weights, found[0][1]) == []


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_a_slow_update_is_waited_for(monkeypatch, max_grad_norm):
    """In fp32 the fetch stream joins the halves of blocks in HBM, which kernels on another stream update."""
    from horizon.optim.triton_kernel import TritonUpdate

    model = build("llama, tied", **EAGER)
    settings = {"compute_dtype": "float32", "max_grad_norm": max_grad_norm}
    expected = train(model, placed(2), **settings)
    update = TritonUpdate.__call__

    def slow(self, *arguments):
        torch.cuda._sleep(CYCLES)
        update(self, *arguments)

    monkeypatch.setattr(TritonUpdate, "__call__", slow)
    found = train(model, placed(2), **settings)
    assert found[0] == expected[0] and differing(found[1], expected[1]) == []
    if max_grad_norm is None:
        return  # there, the host waits before it publishes
    wait_event = torch.cuda.Stream.wait_event

    def forgetful(self, event):
        if sys._getframe(1).f_code.co_name != "_load":
            wait_event(self, event)

    monkeypatch.setattr(torch.cuda.Stream, "wait_event", forgetful)
    with suppress(NonFiniteError):  # half of an old value and half of a new one may be anything
        broken = train(model, placed(2), **settings)
        assert broken[0] != expected[0] or differing(broken[1], expected[1])


@pytest.mark.parametrize("num_blocks", [1, 5])
@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_a_step_makes_the_host_wait_for_nothing(monkeypatch, max_grad_norm, num_blocks):
    model, memory = build("llama, tied"), placed(num_blocks)
    with engine(model, compute_dtype="bfloat16", max_grad_norm=max_grad_norm, memory=memory) as streamed:
        streamed.step(batches()), streamed.step(batches())  # kernels compile, the working set is measured
        watch(streamed, monkeypatch)
        try:
            assert streamed.step(batches()).loss > 0
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- memory


def medium(memory, announced=False):
    """(planned, measured) device bytes of steps of 4 micro-batches with 8 rows, and the engine's store's host bytes."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with engine(MEDIUM, compute_dtype="bfloat16", memory=memory) as streamed:
        if announced:
            streamed.plan_micro_batch(32, TOKENS, 8)
        for seed in range(2):
            streamed.step(batches(4, rows=8, tokens=TOKENS, vocab=VOCAB, seed=seed))
        store = streamed._runtime.store
        assert all(tensor.is_cuda for block in store.in_hbm for tensor in streamed._runtime._states(block).values())
        return streamed.plan.num_bytes("device"), streamed.device_bytes, sum(store.num_bytes.values()), store.in_hbm


@pytest.mark.parametrize("num_blocks", [1, 5, 10])
def test_planned_is_measured(num_blocks):
    memory = placed(num_blocks, recompute="full")
    planned, measured, on_host, in_hbm = medium(memory)
    assert len(in_hbm) == num_blocks
    assert planned - 512 * MIB <= measured <= planned + 256 * MIB
    everything = medium(placed(0, recompute="full"))[2]
    with engine(MEDIUM, memory=placed(0)) as streamed:
        layouts = [lay for lay in streamed._runtime.model.layouts if lay.index in in_hbm]
        moved = num_bytes((*MASTER, *MOMENTS[Moments.float32]), layouts)
    assert abs(everything - moved - on_host) < 16 * MIB


def test_blocks_move_until_the_budget_is_used_and_no_further():
    planned, _, _, _ = medium(placed(4, recompute="full"))
    memory = horizon.MemoryConfig(policy="hbm_first", device_budget=str(planned + 64 * MIB), recompute="full")
    found, measured, _, in_hbm = medium(memory, announced=True)
    assert len(in_hbm) >= 4
    assert found <= planned + 64 * MIB
    assert measured <= planned + 64 * MIB


def test_blocks_come_and_go_without_a_trace_in_the_weights():
    with engine(MEDIUM, compute_dtype="bfloat16", memory=placed(0)) as streamed:
        before = dict(streamed.named_master_parameters())
        runtime = streamed._runtime
        for blocks in ({0, 1, 2}, {9}, set(range(10)), set()):
            runtime.rearrange(replace(runtime.needs, in_hbm=frozenset(blocks)))
            assert differing(dict(streamed.named_master_parameters()), before) == []
            assert all(w.is_cuda == (b in blocks) for b, w in enumerate(runtime.store.weights))
            # by the arenas' own lists: `is_pinned` asks for the memory where the storage begins, which may have left
            registered = {
                pointer for arena in runtime.store._states["weights"]._arenas for pointer in arena._registered
            }
            assert registered == {w.data_ptr() for w in runtime.store.weights if not w.is_cuda}
