"""What every failure must satisfy: its type, one line, no hang, and a process that is as good as before."""

import errno
import itertools
import os
import threading
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import horizon
from horizon.store.arena import Arena

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def pytest_collection_modifyitems(items):
    for item in items:
        if "failures" in item.path.parts:
            item.add_marker(pytest.mark.timeout(60))  # what hangs has failed


def make_batch(seed, rows=2, tokens=16, low=3, high=63):
    ids = torch.randint(low, high, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def train(engine, num_steps=2):
    """Losses of the first steps and the masters after them."""
    losses = [engine.step(make_batch(seed)).loss for seed in range(num_steps)]
    return losses, dict(engine.named_master_parameters())


def equal(a, b):
    """Names and values, bit for bit; NaN equals itself."""
    assert a.keys() == b.keys()
    return all(torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in a)


@pytest.fixture(scope="session")
def arenas():
    """Every arena there is."""
    known, init = weakref.WeakSet(), Arena.__init__

    def remember(arena, *args, **kwargs):
        known.add(arena)
        init(arena, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arena, "__init__", remember)
        yield known


@pytest.fixture(scope="session")
def healthy():
    """What training gives in a process where nothing has gone wrong yet."""
    with horizon.Engine.from_config(LLAMA, device="cpu") as engine:
        return train(engine)


@pytest.fixture(autouse=True)
def process_is_as_good_as_before(healthy, arenas):
    """After the test: no thread of Horizon's, no host memory held, and another engine trains as the first one did."""
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("horizon-")] == []
    assert [arena.num_bytes for arena in arenas if arena._mappings] == []
    with horizon.Engine.from_config(LLAMA, device="cpu", self_check=False) as engine:
        losses, masters = train(engine)
    assert losses == healthy[0]
    assert equal(masters, healthy[1])


@pytest.fixture
def build():
    """Builds engines of the tiny llama (or of another model) and closes them after the test."""
    engines = []

    def build(model=None, **settings):
        engine = horizon.Engine.from_pretrained(LLAMA if model is None else model, **{"device": "cpu", **settings})
        engines.append(engine)
        return engine

    yield build
    for engine in engines:
        engine.close()


@pytest.fixture
def fails():
    """`with fails(kind, pattern):` the block raises exactly that kind, on one line."""

    @contextmanager
    def fails(kind, pattern):
        with pytest.raises(kind, match=pattern) as caught:
            yield caught
        assert type(caught.value) is kind
        assert "\n" not in str(caught.value)

    return fails


@pytest.fixture
def tools():
    """The helpers above, as a namespace."""
    return SimpleNamespace(LLAMA=LLAMA, make_batch=make_batch, train=train, equal=equal)


@pytest.fixture
def memory(tmp_path):
    (tmp_path / "nvme").mkdir()
    return lambda **settings: horizon.MemoryConfig(
        **{"policy": "nvme_all", "nvme_dir": str(tmp_path / "nvme"), **settings}
    )


@pytest.fixture
def break_disk(monkeypatch):
    """`break_disk("preadv", n)`: from the n-th call on, that system call fails."""

    def break_disk(call, number, error=errno.EIO):
        real, calls = getattr(os, call), itertools.count(1)

        def broken(*args):
            if next(calls) >= number:
                raise OSError(error, os.strerror(error))
            return real(*args)

        monkeypatch.setattr(os, call, broken)

    return break_disk
