from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from horizon import MemoryConfig
from horizon.config.schema import Moments, Policy, Tier, TierRule
from horizon.errors import BudgetError, ConfigError
from horizon.layout import ParamSpec, place_block
from horizon.plan.memory import Limits, MemoryNeeds, fixed_lines, plan_memory
from horizon.plan.placement import Placer, first_blocks, preference, read_policy, unknown_activations
from horizon.units import GIB

BF16, FP32 = torch.bfloat16, torch.float32
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
EMBED = place_block(0, "embed", [ParamSpec("e", "e", (100, 64))])  # 8192 elements with padding
LAYERS = [
    place_block(i, f"l{i}", [ParamSpec(f"l{i}.w", "w", (64, 64)), ParamSpec(f"l{i}.f", "f", (50,), False)])
    for i in (1, 2)
]  # 4096 trained, 2048 frozen
HEAD = place_block(3, "head", [ParamSpec("n", "n", (64,)), ParamSpec("lm", "lm", (100, 64))])  # 8192
TIED_HEAD = place_block(3, "head", [ParamSpec("n", "n", (64,))], [("lm", 0, EMBED.params[0])])  # 2048; 10240 in a slot
UNTIED, TIED = (EMBED, *LAYERS, HEAD), (EMBED, *LAYERS, TIED_HEAD)


def needs(layouts=UNTIED, compute=BF16, grad=BF16, keeps=True, in_hbm=frozenset()):
    return MemoryNeeds(layouts, compute, grad, keeps, 2, host_overhead=1000, device_overhead=500, in_hbm=in_hbm)


def by_purpose(wanted):
    return {(line.tier, line.purpose): line.num_bytes for line in fixed_lines(wanted)}


def tier(wanted, name):
    return sum(num_bytes for (tier, _), num_bytes in by_purpose(wanted).items() if tier == name)


def test_blocks_move_in_this_order():
    assert preference(UNTIED) == [0, 1, 2, 3]
    assert preference(TIED) == [0, 3, 1, 2]  # a tied head's own states are next to nothing, its slot is the largest
    assert first_blocks(TIED, 2) == {0, 3}


def test_lines_of_blocks_on_both_tiers():
    assert by_purpose(needs(in_hbm=frozenset({0, 1}))) == {
        ("host", "weights (bf16)"): 2 * (6144 + 8192),
        ("host", "residual (low halves)"): 2 * (6144 + 8192),
        ("host", "exp_avg, exp_avg_sq (fp32)"): 8 * (4096 + 8192),
        ("host", "gradients"): 2 * (4096 + 8192),
        ("host", "framework"): 1000,
        ("device", "weight slots (2)"): 2 * 2 * 8192,
        ("device", "gradient slots"): 8192 * (4 + 2 * 2),
        ("device", "framework and buffers"): 500,
        ("device", "states of 2 blocks"): 12 * (8192 + 4096) + 4 * 2048,
        ("device", "gradients of 2 blocks"): 2 * (8192 + 4096),
    }


@pytest.mark.parametrize(
    ("change", "purpose", "num_bytes"),
    [
        ({"keeps": False}, "gradient ring of 3 blocks", 3 * 2 * 8192),
        ({"grad": FP32}, "gradients of 3 blocks", 4 * (8192 + 2048 + 4096)),
        ({}, "weight slots (2)", 2 * 2 * 6144),  # a layer's: embedding and head are not in one
        ({"compute": FP32}, "weight slots (2)", 2 * 8 * 10240),  # halves are joined in a slot wherever they are
        # the sum holds the head's share of the embedding, a drain slot what is trained of a layer
        ({}, "gradient slots", 10240 * 4 + 2 * 2 * 4096),
        ({"grad": FP32}, "gradient slots", 10240 * 4 + 2 * 4 * 4096),
    ],
)
def test_what_a_tied_embedding_and_its_head_in_hbm_leave_of_the_slots(change, purpose, num_bytes):
    assert by_purpose(needs(TIED, in_hbm=frozenset({0, 1, 3}), **change))["device", purpose] == num_bytes


def test_with_all_blocks_in_hbm_the_host_holds_the_framework_only():
    lines = by_purpose(needs(in_hbm=frozenset(range(4))))
    assert tier(needs(in_hbm=frozenset(range(4))), "host") == 1000
    assert lines["device", "weight slots (2)"] == 0


CASES = st.tuples(
    st.sampled_from([UNTIED, TIED]),
    st.sampled_from([BF16, FP32]),
    st.booleans(),
    st.integers(0, 600_000),  # device
    st.one_of(st.integers(0, 400_000), st.just(1 << 40)),  # host
    st.integers(0, 200_000),  # reserve
)


@settings(max_examples=300, deadline=None)
@given(CASES)
def test_as_many_blocks_as_fit_beside_the_reserve_or_as_the_host_cannot_hold(case):
    layouts, dtype, keeps, device, host, reserve = case
    wanted, limits = needs(layouts, dtype, dtype, keeps), Limits(host, device)
    options = [replace(wanted, in_hbm=first_blocks(layouts, n)) for n in range(5)]
    fitting = [n for n, option in enumerate(options) if tier(option, "device") + reserve <= device]
    allowed = [n for n, option in enumerate(options) if tier(option, "host") <= host]
    found = Placer(Policy.hbm_first).place(wanted, limits, reserve)
    most = max(fitting, default=0)
    if most in allowed or not allowed:
        assert found == options[most]
    elif tier(options[min(allowed)], "device") <= device:
        assert found == options[min(allowed)]
    else:  # neither tier has the room: the plan says so
        assert found == options[most]
        with pytest.raises(BudgetError):
            plan_memory(found, limits)


@settings(max_examples=100, deadline=None)
@given(CASES, st.integers(0, 4))
def test_making_room_moves_no_block_to_hbm(case, present):
    layouts, dtype, keeps, device, host, reserve = case
    wanted = needs(layouts, dtype, dtype, keeps, first_blocks(layouts, present))
    placer, limits = Placer(Policy.hbm_first), Limits(host, device)
    found = placer.make_room(wanted, limits, reserve).in_hbm
    assert found == wanted.in_hbm & placer.place(wanted, limits, reserve).in_hbm


def test_the_fewest_blocks_are_those_that_the_host_has_no_room_for():
    host = tier(needs(in_hbm=frozenset({0})), "host")
    limits = Limits(host, 1 << 40)
    assert Placer(Policy.auto).place(needs(), limits, reserve=limits.device).in_hbm == {0}


@pytest.mark.parametrize(("layouts", "first"), [(UNTIED, {0}), (TIED, {0, 3})], ids=["untied", "tied"])
def test_with_auto_the_embedding_comes_before_what_layers_keep(layouts, first):

    def bases(*placer, host=1 << 40):
        return [n.in_hbm for n in Placer(*placer).bases(needs(layouts), Limits(host, 1 << 40))]

    assert bases(Policy.auto) == [first, set()]
    assert bases(Policy.hbm_first) == bases(Policy.dram) == [set()]
    assert bases(Policy.auto, 3) == [first_blocks(layouts, 3)]
    forced = tier(needs(layouts, in_hbm=first_blocks(layouts, 3)), "host")
    assert bases(Policy.auto, host=forced) == [first_blocks(layouts, 3)] * 2  # the host has no room for the third


def test_so_many_blocks_as_the_setting_says_whatever_there_is_room_for():
    placer = Placer(Policy.auto, 2)
    assert placer.place(needs(), Limits(0, 0), 1 << 50).in_hbm == {0, 1}
    assert not placer.moves and Placer(Policy.auto).moves and not Placer(Policy.dram).moves
    with pytest.raises(BudgetError, match=r"states of 2 blocks .* fewer blocks in HBM \(memory.hbm_blocks\)"):
        plan_memory(placer.place(needs(), Limits(1 << 40, 1000), 0), Limits(1 << 40, 1000))


@pytest.mark.parametrize(
    ("memory", "device", "can_update", "expected"),
    [
        ({}, CPU, True, Placer(Policy.dram)),
        ({}, GPU, True, Placer(Policy.auto)),
        ({}, GPU, False, Placer(Policy.dram)),
        ({"policy": "dram"}, GPU, True, Placer(Policy.dram)),
        ({"policy": "hbm_first"}, CPU, True, Placer(Policy.hbm_first)),
        ({"hbm_blocks": 0}, GPU, False, Placer(Policy.dram, 0)),
        ({"policy": "auto", "hbm_blocks": 3}, CPU, True, Placer(Policy.dram, 3)),
        ({"policy": Policy.dram, "hbm_blocks": 0}, GPU, True, Placer(Policy.dram, 0)),
        (
            {"nvme_dir": "there", "host_reserve": "2GiB"},
            GPU,
            True,
            Placer(Policy.auto, spills=True, reserve=2 << 30),
        ),
    ],
)
def test_what_settings_mean(memory, device, can_update, expected):
    assert read_policy(MemoryConfig(**memory), device, can_update, num_blocks=4) == expected


@pytest.mark.parametrize(
    ("memory", "can_update", "message"),
    [
        ({"policy": "cxl"}, True, "memory.policy='cxl': expected one of auto, dram, hbm_first"),
        ({"hbm_blocks": 5}, True, "memory.hbm_blocks=5: expected null, or 0 to 4, the model's blocks"),
        ({"hbm_blocks": -1}, True, "memory.hbm_blocks=-1: expected null"),
        ({"policy": "dram", "hbm_blocks": 1}, True, "memory.hbm_blocks=1 with memory.policy=dram"),
        ({"policy": "hbm_first"}, False, "updated with Triton, which is not installed here; use memory.policy=dram"),
        ({"hbm_blocks": 1}, False, "updated with Triton"),
        ({"host_reserve": "2GiB"}, True, "memory.host_reserve=2GiB without memory.nvme_dir: nothing leaves"),
        (
            {"host_reserve": "2GiB", "nvme_dir": "there", "policy": "nvme_all"},
            True,
            "memory.host_reserve=2GiB with memory.policy=nvme_all: nothing leaves host memory for it; use",
        ),
        (
            {"host_reserve": "2GiB", "nvme_dir": "there", "rules": [TierRule(state="exp_avg", tier=Tier.nvme)]},
            True,
            "memory.host_reserve=2GiB with memory.rules",
        ),
        ({"host_reserve": "some", "nvme_dir": "there"}, True, "memory.host_reserve='some' is not a size"),
    ],
)
def test_settings_that_cannot_work_are_refused(memory, can_update, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_policy(MemoryConfig(**memory), GPU, can_update, num_blocks=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("moments", [Moments.bfloat16, Moments.int8])
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_moments_in_fewer_bits_stay_on_the_host(device, moments):
    for memory in ({}, {"policy": "dram"}, {"hbm_blocks": 0}):
        placer = read_policy(MemoryConfig(**memory), device, True, 4, moments)
        assert placer.place(needs(), Limits(1 << 50, 1 << 50), 0).in_hbm == set() and not placer.moves
    for memory, setting in (({"policy": "hbm_first"}, "policy=hbm_first"), ({"hbm_blocks": 1}, "hbm_blocks=1")):
        with pytest.raises(ConfigError, match=rf"memory.{setting} with optim.moments={moments}.*memory.policy=dram"):
            read_policy(MemoryConfig(**memory), device, True, 4, moments)


def test_activations_of_unknown_batches_get_a_quarter_of_a_large_device():
    assert unknown_activations(Limits(0, 24 * GIB)) == 16 * GIB
    assert unknown_activations(Limits(0, 140 * GIB)) == 35 * GIB
