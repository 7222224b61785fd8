"""Host memory that CUDA refuses to register: training goes on through staging, and the log says so."""

import gc

import pytest
import torch

from horizon import AdamW, MemoryConfig
from horizon.errors import BudgetError
from horizon.layout import ParamSpec, place_block
from horizon.store import arena, offload
from horizon.store.arena import Arena
from horizon.store.host import HostStore
from horizon.store.offload import OffloadSpace, cut
from tests.covering import pairwise
from tests.parity.reference import LR, assert_same_tensors, build, engine_for, plain


class Registrations:
    """Stands for CUDA's runtime: keeps to a limit of bytes, and to its rules."""

    def __init__(self, limit):
        self.limit, self.held, self.refused = limit, {}, 0

    def cudaHostRegister(self, pointer, size, flags):
        assert pointer not in self.held and size > 0 and flags == 1
        if sum(self.held.values()) + size > self.limit:
            self.refused += 1
            return 2
        self.held[pointer] = size
        return 0

    def cudaHostUnregister(self, pointer):
        del self.held[pointer]
        return 0


@pytest.fixture
def cuda(monkeypatch):
    """`cuda(limit)`: from now on so many bytes can be registered."""

    def cuda(limit):
        registrations = Registrations(limit)
        monkeypatch.setattr(arena, "_cudart", lambda: registrations)
        return registrations

    return cuda


def test_an_arena_is_pinned_whole_or_not_at_all(cuda, caplog):
    registrations = cuda(10_000)
    space = Arena([4096, 4096, 4096], "weights", pin=True)
    assert not space.pinned and registrations.held == {}
    assert "refuses to register 4 KiB of host memory for weights (status 2): all of it stays pageable" in caplog.text
    assert [region.numel() for region in space.regions] == [4096] * 3
    space.release(0)
    space.close()
    small = Arena([4096, 0, 4096], "residual", pin=True)
    assert small.pinned and sorted(registrations.held.values()) == [4096, 4096]
    small.close()
    assert registrations.held == {}


BLOCKS = [place_block(i, f"b{i}", [ParamSpec(f"w{i}", "w", (100, 64))]) for i in range(3)]


@pytest.mark.parametrize(("limit", "staged"), [(1 << 30, False), (40_000, True), (0, True)])
def test_what_cannot_be_registered_is_staged(cuda, limit, staged, caplog):
    registrations = cuda(limit)
    store = HostStore(BLOCKS, pin=True, pin_residual=False)
    assert (store.loads is not None) is staged and ("staging" in caplog.text) is staged
    if staged:
        assert store.loads.blocks == {0, 1, 2}
        assert len(registrations.held) == (2 if limit else 0)  # the staging, where that much can be
        for block in range(3):
            store.weights[block].fill_(block + 1)
        store.loads.begin([0, 1, 2], 0, set())
        for visit in range(3):
            store.loads.wait(visit)
            source = store.loads.source(visit, "weights", store.loads._parts[visit][0].part)
            assert source.data_ptr() != store.weights[visit].data_ptr() and bool((source == visit + 1).all())
            store.loads.done(visit)
    store.close()
    assert registrations.held == {}


@pairwise(limit=[0, 30_000, 60_000, 1 << 40], clip=[0.5, None], dtype=["float32", "bfloat16"])
def test_training_is_the_same_whatever_can_be_registered(cuda, monkeypatch, dtype, clip, limit, tmp_path):
    """On CPU, with pinning asked for as on a GPU."""
    registrations = cuda(limit)
    found = []
    for pins, memory in ((False, {}), (True, {}), (True, {"policy": "nvme_optimizer", "nvme_dir": str(tmp_path)})):
        monkeypatch.setattr("horizon.runtime.pins", lambda device, pins=pins: pins)
        settings = {"memory": MemoryConfig(**memory), "compute_dtype": dtype, "max_grad_norm": clip}
        with engine_for(build("llama", tie_word_embeddings=True), optimizer=AdamW(lr=LR), **settings) as engine:
            losses = [engine.step([plain(seed), plain(seed + 9)]).loss for seed in range(3)]
            found.append((losses, dict(engine.named_master_parameters())))
    assert (registrations.refused > 0) is (limit < 1 << 40)
    assert registrations.held == {}
    for losses, weights in found[1:]:
        assert losses == found[0][0]
        assert_same_tensors(weights, found[0][1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["dram", "nvme_optimizer", "nvme_all"])
def test_the_plan_has_the_staging_that_a_refusal_takes(cuda, monkeypatch, dtype, policy, tmp_path):
    cuda(0)
    monkeypatch.setattr("horizon.runtime.pins", lambda device: True)
    memory = MemoryConfig(policy=policy, nvme_dir=str(tmp_path))
    settings = {"memory": memory, "compute_dtype": dtype, "device": "cpu"}
    with engine_for(build("llama", hidden_size=256, vocab_size=512), **settings) as engine:
        store, planned = engine._runtime.store, {line.purpose: line.num_bytes for line in engine.plan.lines}
        buffers = engine._runtime.buffers
        arenas = [a for state in store._states.values() for a in state._arenas]
        arenas += [buffers._spill._arena] if policy == "nvme_all" else buffers._buffers._arenas
        arenas += [part._arena for part in (store.loads, store.pages) if part is not None]
        measured = sum(region.numel() for a in arenas for region in a.regions)
        assert measured == engine.plan.num_bytes("host") - planned["framework"]
        crossing = {"weights"} if dtype == "bfloat16" else {"weights", "residual"}
        assert engine._runtime.needs.pageable == crossing - {name for name, _ in store.on_nvme}
        purpose = "nvme staging, loads" if policy == "nvme_all" else "pinned staging, loads"
        assert planned[purpose] == sum(region.numel() for region in store.loads._arena.regions) > 0
        engine.plan_micro_batch(2, 12)
        assert {line.purpose for line in engine.plan.lines} == set(planned)  # and it stays there
        budget = engine.plan.num_bytes("host") - planned[purpose] // 2
    # What was there before staging fits, and the rest does not: refused, and all is given back.
    monkeypatch.setattr("horizon.runtime.host_overhead", lambda device: planned["framework"])
    settings["memory"] = MemoryConfig(policy=policy, nvme_dir=str(tmp_path), host_budget=f"{budget}B")
    with pytest.raises(BudgetError, match=rf"of host memory .*{purpose}"):
        engine_for(build("llama", hidden_size=256, vocab_size=512), **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_stay_where_they_are_beside_pageable_memory(cuda, monkeypatch, dtype):
    """Their staging was made for where they were."""
    cuda(0)
    found = []
    for pins in (False, True):
        monkeypatch.setattr("horizon.runtime.pins", lambda device, pins=pins: pins)
        memory = MemoryConfig(policy="hbm_first", device_budget="8MiB")
        with engine_for(build("llama", tie_word_embeddings=True), memory=memory, compute_dtype=dtype) as engine:
            before = engine._runtime.store.in_hbm
            engine.plan_micro_batch(2, 12)
            assert (engine._runtime.store.in_hbm == before) is pins
            losses = [engine.step(plain(seed)).loss for seed in range(3)]
            found.append((losses, dict(engine.named_master_parameters())))
    assert found[1][0] == found[0][0]
    assert_same_tensors(found[1][1], found[0][1])


# ---- pieces


def test_offloaded_activations_are_cut_where_a_registration_ends(monkeypatch, cuda):
    monkeypatch.setattr(offload, "PIECE", 8192)
    registrations, space = cuda(1 << 30), OffloadSpace(pin=True)
    sizes = {(block, m): 5000 for block in (3, 2, 1) for m in (0, 1)}
    regions = space.regions(sizes, [])
    assert max(registrations.held.values()) <= 8192 and len(registrations.held) == 4
    starts = sorted(registrations.held.items())
    for number, (key, pieces) in enumerate(regions.items()):
        assert sum(piece.numel() for piece in pieces) == 5000, key
        for piece in pieces:
            first, last = piece.data_ptr(), piece.data_ptr() + piece.numel()
            assert sum(start <= first and last <= start + size for start, size in starts) == 1
            piece.fill_(number)
    for number, pieces in enumerate(regions.values()):
        assert all(bool((piece == number).all()) for piece in pieces)
    space.close()
    gc.collect()


def test_a_cut_of_regions_that_follow_each_other():
    flat = torch.arange(20)
    regions = [flat[:8], flat[8:16], flat[16:]]
    for start in range(20):
        for stop in range(start + 1, 21):
            assert torch.equal(torch.cat(cut(regions, start, stop)), flat[start:stop])


# ---- on a GPU


class Refusing:
    """CUDA's runtime, that refuses large regions as it would: with an error that waits for the next kernel."""

    def __init__(self, real, limit):
        self.real, self.limit, self.refused = real, limit, 0

    def cudaHostRegister(self, pointer, size, flags):
        if size <= self.limit:
            return self.real.cudaHostRegister(pointer, size, flags)
        self.refused += 1
        return self.real.cudaHostRegister(0, size, flags)  # refused for good, as memory that is not there

    def cudaHostUnregister(self, pointer):
        return self.real.cudaHostUnregister(pointer)


@pytest.mark.gpu
@pytest.mark.parametrize("limit", [0, 100_000])
def test_a_gpu_trains_from_pageable_memory(monkeypatch, limit):
    found = []
    for refuses in (False, True):
        real = torch.cuda.cudart()
        fake = Refusing(real, limit)
        monkeypatch.setattr(arena, "_cudart", lambda fake=fake, real=real, refuses=refuses: fake if refuses else real)
        settings = {"device": "cuda", "memory": MemoryConfig(policy="dram"), "compute_dtype": "bfloat16"}
        with engine_for(build("llama", hidden_size=256, vocab_size=512), **settings) as engine:
            found.append([engine.step([plain(seed), plain(seed + 9)]).loss for seed in range(4)])
            assert (engine._runtime.store.loads is not None) is refuses
            assert (fake.refused > 0) is refuses
    assert found[1] == pytest.approx(found[0], rel=1e-3)
