import pytest
import torch

from horizon.config.schema import Moments
from horizon.errors import CheckpointError
from horizon.layout import ParamSpec, place_block
from horizon.store import host, tiers
from horizon.store.arena import HUGE_PAGE
from horizon.store.host import HostStore
from horizon.store.split import split_master

LAYOUTS = (
    place_block(0, "embed", [ParamSpec("embed.w", "w", (50, 8)), ParamSpec("embed.frozen", "f", (70,), False)]),
    place_block(1, "layer", [ParamSpec("layer.frozen", "f", (9,), False), ParamSpec("layer.w", "w", (8, 300))]),
)
PARAMS = [(lay.index, p) for lay in LAYOUTS for p in lay.params]


@pytest.fixture
def store():
    store = HostStore(LAYOUTS, pin=False, pin_residual=False)
    yield store
    store.close()


def values(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {p.name: torch.randn(p.spec.shape, generator=generator).to(dtype) for _, p in PARAMS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_comes_back_exactly_by_name(store, dtype):
    for name, value in values(dtype).items():
        store.write_master(name, value)
    assert sorted(store.names()) == sorted(p.name for _, p in PARAMS)
    for name, value in values(dtype).items():
        assert store.read_master(name).dtype == torch.float32
        assert torch.equal(store.read_master(name), value.float()), name


def test_a_parameter_lies_where_the_layout_says_and_nothing_else_is_touched(store):
    for name, value in values().items():
        store.write_master(name, value)
    for layout in LAYOUTS:
        expected = torch.zeros(layout.num_elements)
        for p in layout.params:
            expected[p.offset : p.end] = values()[p.name].flatten()
        high, low = split_master(expected)
        assert torch.equal(store.weights[layout.index], high)
        assert torch.equal(store.residual[layout.index], low)


def test_a_transposed_value_is_stored_as_it_reads(store):
    value = torch.randn(300, 8).t()
    store.write_master("layer.w", value)
    assert torch.equal(store.read_master("layer.w"), value)


def test_a_read_value_is_a_copy(store):
    store.read_master("layer.w").fill_(1.0)
    assert torch.equal(store.read_master("layer.w"), torch.zeros(8, 300))


PER_64 = {  # trainable elements
    "float32": {"exp_avg": (torch.float32, 64), "exp_avg_sq": (torch.float32, 64)},
    "bfloat16": {"exp_avg": (torch.bfloat16, 64), "exp_avg_sq": (torch.bfloat16, 64)},
    "int8": {
        "exp_avg": (torch.uint8, 64),
        "exp_avg_sq": (torch.uint8, 64),
        "exp_avg_scale": (torch.float32, 1),
        "exp_avg_sq_scale": (torch.float32, 1),
    },
}


@pytest.mark.parametrize("moments", Moments)
def test_states_have_the_formats_sizes_and_start_at_zero(moments):
    store = HostStore(LAYOUTS, pin=False, pin_residual=False, moments=moments)
    bytes_needed = dict.fromkeys(("weights", "residual", *PER_64[moments]), 0)
    for layout in LAYOUTS:
        expected = {"weights": (torch.bfloat16, layout.num_elements), "residual": (torch.int16, layout.num_elements)}
        for name, (dtype, numbers) in PER_64[moments].items():
            expected[name] = dtype, numbers * layout.num_trainable // 64
        found = store.states(layout.index)
        assert {name: (state.dtype, state.numel()) for name, state in found.items()} == expected
        assert not any(bool(state.view(torch.uint8).any()) for state in found.values())
        for name, state in found.items():
            bytes_needed[name] += state.nbytes
    assert list(store.num_bytes) == list(bytes_needed)
    for name, num_bytes in store.num_bytes.items():
        assert 0 <= num_bytes - bytes_needed[name] < HUGE_PAGE  # up to the rounding of a mapping
    store.close()


def test_an_unknown_name_is_refused_by_name(store):
    for call in (store.read_master, lambda name: store.write_master(name, torch.zeros(1))):
        with pytest.raises(CheckpointError, match=r"the model has no parameter 'layer\.v'"):
            call("layer.v")


@pytest.mark.parametrize("shape", [(300, 8), (8, 299), (2400,)])
def test_a_wrong_shape_is_refused_with_both_shapes(store, shape):
    with pytest.raises(CheckpointError) as error:
        store.write_master("layer.w", torch.zeros(shape))
    assert str(error.value) == f"layer.w has shape {shape}, the model expects (8, 300)"


def test_when_one_state_does_not_fit_the_others_are_given_back(monkeypatch):
    closed = []

    class Arena(tiers.Arena):
        def __init__(self, sizes, purpose, pin, nodes):
            if purpose == "exp_avg_sq":
                raise MemoryError
            super().__init__(sizes, purpose, pin, nodes)
            self.purpose = purpose

        def close(self):
            closed.append(self.purpose)
            super().close()

    monkeypatch.setattr(tiers, "Arena", Arena)
    with pytest.raises(MemoryError):
        HostStore(LAYOUTS, pin=False, pin_residual=False)
    assert closed == ["weights", "residual", "exp_avg"]


def test_close_may_be_called_again(store):
    store.close()
    store.close()
    assert store.weights == [] and store.moments == {}


def test_a_parameter_is_written_piece_by_piece_like_at_once(monkeypatch):
    value = torch.randn(3, 70, generator=torch.Generator().manual_seed(1))
    layout = place_block(0, "layer", [ParamSpec("a", "a", (5,)), ParamSpec("w", "w", (3, 70))])
    for size in (1, 64, 209, 210, 1 << 20):
        monkeypatch.setattr(host, "WRITE_PIECE", size)
        store = HostStore([layout], pin=False, pin_residual=False)
        store.write_master("w", value)
        assert torch.equal(store.read_master("w"), value)
        assert not store.read_master("a").any()
        store.close()
