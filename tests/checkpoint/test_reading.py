"""Arrays are read by several threads: every bit, a few chunks at a time, and of several errors the first is told."""

import functools
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import horizon
from horizon.checkpoint import format as on_disk
from horizon.checkpoint import reading, restore
from horizon.checkpoint.arrays import ArrayWriter
from horizon.checkpoint.crc32c import crc32c
from horizon.checkpoint.format import DTYPES, ArraySpec
from horizon.checkpoint.reader import Checkpoint
from horizon.checkpoint.reading import read_arrays, read_chunks
from horizon.errors import CheckpointError, TierError
from tests.checkpoint.engines import build, equal, load, states, train

SHAPES = {"matrix": (37, 24), "rows longer than a chunk": (3, 700), "vector": (64,), "scalar": (), "none": (0, 5)}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(on_disk, "chunk_shape", functools.partial(on_disk.chunk_shape, chunk_bytes=1024))


def write(folder, specs):
    """Any bits; by name and kind."""
    generator = torch.Generator().manual_seed(0)
    writer, written = ArrayWriter(folder), {}
    for spec in specs:
        if spec.dtype == "bool":
            values = torch.rand(spec.shape, generator=generator) < 0.5
        else:
            bits = torch.randint(0, 256, (spec.num_bytes,), generator=generator, dtype=torch.uint8)
            values = bits.view(DTYPES[spec.dtype]).view(spec.shape)
        written[spec.name, spec.kind] = values
        writer.create(spec)
        for chunk in spec.chunks:
            writer.write(spec, chunk, values[chunk.index].contiguous(), lambda: None)
    writer.finish()
    return written


def vectors(num, numel=300):
    return [ArraySpec(f"a{number}", "master", (numel,), "float32") for number in range(num)]


def flip(folder, spec, file="c.0"):
    path = folder / spec.folder / file
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(bytes(content))


def as_bits(values):
    return values.reshape(-1).view(torch.uint8)


# ---- values


@given(st.binary(max_size=70), st.integers(0, 7))
def test_the_checksum_is_that_of_the_definition(data, start):
    remainder = 0xFFFFFFFF
    for byte in data[start:]:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
    assert crc32c(np.frombuffer(bytearray(data), np.uint8)[start:]) == remainder ^ 0xFFFFFFFF
    assert crc32c(np.frombuffer(bytearray(b"123456789"), np.uint8)) == 0xE3069283  # the one that everybody gives


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_of_every_array_comes_back(dtype, tmp_path, small_chunks):
    specs = [ArraySpec(name, "buffer", shape, dtype) for name, shape in SHAPES.items()]
    written = write(tmp_path, specs)
    found = {key: torch.zeros_like(values) for key, values in written.items()}
    lock, starts = threading.Lock(), []

    def use(spec, start, numbers):
        with lock:
            starts.append((spec.name, start))
        found[spec.name, spec.kind].view(-1)[start : start + numbers.numel()] = numbers

    read_arrays(tmp_path, [(spec, functools.partial(use, spec)) for spec in specs])
    assert sorted(starts) == sorted((spec.name, chunk.start) for spec in specs for chunk in spec.chunks)
    assert max(len(spec.chunks) for spec in specs) > 1 or DTYPES[dtype].itemsize == 1
    for spec in specs:
        expected = as_bits(written[spec.name, spec.kind])
        assert torch.equal(as_bits(found[spec.name, spec.kind]), expected)
        in_order = [(start, numbers.clone()) for start, numbers in read_chunks(tmp_path, spec)]
        assert [start for start, _ in in_order] == [chunk.start for chunk in spec.chunks]
        assert torch.equal(torch.cat([torch.empty(0, dtype=torch.uint8), *(as_bits(n) for _, n in in_order)]), expected)


@pytest.mark.parametrize("master", ["split", "bf16_stochastic"])
def test_what_an_engine_takes_from_many_chunks_is_what_was_saved(master, tmp_path, small_chunks, monkeypatch):
    monkeypatch.setattr(restore, "PIECE", 100)  # several to a chunk
    adamw = horizon.AdamW(lr=1e-2, master=master)
    with build(optimizer=adamw) as engine:
        train(engine, 1, 2)
        expected, masters = states(engine), dict(engine.named_master_parameters())
        engine.save_checkpoint(tmp_path / "saved").wait()
    checkpoint = Checkpoint(tmp_path / "saved")
    assert max(len(spec.chunks) for spec in checkpoint.manifest.arrays) > 4
    checkpoint.verify()
    assert equal(dict(checkpoint.named_parameters()), masters)
    places = [None, horizon.MemoryConfig(policy="nvme_all", nvme_dir=str(tmp_path))]
    places += [horizon.MemoryConfig(hbm_blocks=2)] if master == "split" else []
    for memory in places:
        with load(tmp_path / "saved", optimizer=adamw, memory=memory) as engine:
            assert equal(states(engine), expected)


# ---- how many at a time


def test_as_many_chunks_as_there_are_rooms_are_under_way_and_no_more(tmp_path, monkeypatch):
    """The first three meet; from then on there is always somebody to wait for, and nobody waits in vain."""
    arena, sizes = reading.Arena, []
    monkeypatch.setattr(
        reading, "Arena", lambda *args, **keywords: (sizes.extend(args[0]), arena(*args, **keywords))[1]
    )
    monkeypatch.setattr(reading, "NUM_ROOMS", 3)
    specs, meeting, lock = vectors(30), threading.Barrier(3), threading.Lock()
    write(tmp_path, specs)
    under_way, most, rooms = 0, 0, set()

    def use(start, numbers):
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
            rooms.add(numbers.data_ptr())
        meeting.wait(10)
        with lock:
            under_way -= 1

    read_arrays(tmp_path, [(spec, use) for spec in specs])
    assert most == len(rooms) == 3
    assert sizes == [4096] * 3
    assert threads() == []


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("horizon-")]


# ---- errors


def test_of_several_damaged_arrays_the_first_is_named_though_it_is_read_last(tmp_path, monkeypatch):
    specs, others_told = vectors(8), threading.Event()
    write(tmp_path, specs)
    for number in (2, 3, 6):
        flip(tmp_path, specs[number])
    fill, damaged = reading._fill, reading.damaged

    def late(room, path, *arguments):
        if "/a2/" in str(path):
            assert others_told.wait(10)
        fill(room, path, *arguments)

    def told(folder, spec, what):
        if spec.name == "a3":
            others_told.set()
        return damaged(folder, spec, what)

    monkeypatch.setattr(reading, "_fill", late)
    monkeypatch.setattr(reading, "damaged", told)
    with pytest.raises(CheckpointError, match=r"damaged at a2 \(master\): c\.0 does not match its checksum"):
        read_arrays(tmp_path, [(spec, lambda start, numbers: None) for spec in specs])
    assert threads() == []


@pytest.mark.parametrize("kind", ["master", "exp_avg"])
def test_an_engine_names_the_first_of_its_damaged_arrays(tmp_path, kind):
    with build() as engine:
        engine.save_checkpoint(tmp_path / "saved").wait()
    checkpoint = Checkpoint(tmp_path / "saved")
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.weight"]
    for name in names:
        flip(tmp_path / "saved", checkpoint.spec(name, kind), "c.0.0")
    for _ in range(5):
        with pytest.raises(CheckpointError, match=rf"damaged at {names[0]} \({kind}\)"):
            load(tmp_path / "saved")


def test_numbers_of_a_damaged_chunk_are_seen_by_nobody(tmp_path):
    specs, seen = vectors(3), []
    write(tmp_path, specs)
    flip(tmp_path, specs[1])
    with pytest.raises(CheckpointError, match="damaged at a1"):
        read_arrays(tmp_path, [(spec, lambda start, n, spec=spec: seen.append(spec.name)) for spec in specs])
    assert "a0" in seen and "a1" not in seen
    with pytest.raises(CheckpointError, match="damaged at a1"):
        next(read_chunks(tmp_path, specs[1]))


def test_a_file_that_is_cut_short_while_it_is_read_is_damage(tmp_path, monkeypatch):
    (spec,) = vectors(1, numel=9000)
    write(tmp_path, [spec])
    path = tmp_path / spec.folder / "c.0"
    path.write_bytes(path.read_bytes()[:8192])
    with pytest.raises(CheckpointError, match=r"damaged at a0 .*it has 8192 bytes instead of 36004"):
        read_arrays(tmp_path, [(spec, lambda start, numbers: None)])


def test_what_fails_to_take_the_numbers_is_told_as_it_is_and_ends_the_reading(tmp_path):
    specs, error, used = vectors(200), TierError("the disk is gone"), []
    write(tmp_path, specs)

    def use(number, start, numbers):
        used.append(number)
        if number == 5:
            raise error
        time.sleep(0.005)

    with pytest.raises(TierError) as caught:
        read_arrays(tmp_path, [(spec, functools.partial(use, number)) for number, spec in enumerate(specs)])
    assert caught.value is error
    assert {*range(6)} <= {*used} and len(used) < 100
    assert threads() == []


def test_ctrl_c_ends_the_reading(tmp_path):
    specs, used = vectors(200), []
    write(tmp_path, specs)

    def use(start, numbers):
        used.append(start)
        if len(used) == 5:
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        read_arrays(tmp_path, [(spec, use) for spec in specs])
    assert len(used) < 100
    assert threads() == []
