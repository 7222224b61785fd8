from dataclasses import replace

import pytest
import torch

from horizon.config.schema import Recompute, Tier
from horizon.layout import ParamSpec, place_block
from horizon.plan.activations import ActivationPlan
from horizon.plan.cost import DiskRates, PassTimes, Rates, StepTimes, predict_step, step_cost
from horizon.plan.memory import Limits, MemoryNeeds, plan_memory
from horizon.plan.prediction import StepPrediction
from horizon.plan.traffic import least_traffic
from horizon.plan.updates import UpdateCost

FULL, SELECTIVE, NONE = Recompute.full, Recompute.selective, Recompute.none
EMBED = place_block(0, "embed", [ParamSpec("e", "e", (100, 64))])  # 6400 elements, 8192 with padding
LAYERS = [
    place_block(b, f"layer {b}", [ParamSpec("w", f"{b}.w", (64, 64)), ParamSpec("f", f"{b}.f", (50,), False)])
    for b in (1, 2, 3)
]  # 4096 to train of 6144
HEAD = place_block(4, "head", [ParamSpec("n", "n", (64,))], [("lm", 0, EMBED.params[0])])  # 2048; borrows 6400
KEEP_ALL = ActivationPlan(frozenset(), {}, ())
RATES = Rates(
    up_bytes_per_s=1000, down_bytes_per_s=500, device_bytes_per_s=10_000, updates_per_s=100, overlaps=True
)  # fmt: skip
TIMES = StepTimes(
    32,
    PassTimes(1.0, 2.0),
    {(6144, 4096, FULL): PassTimes(3.0, 9.0), (6144, 4096, SELECTIVE): PassTimes(3.0, 7.0),
     (6144, 4096, NONE): PassTimes(3.5, 6.0)},
    8.0,
)  # fmt: skip


def needs(compute=torch.bfloat16, grad=torch.bfloat16, keeps=True):
    return MemoryNeeds([EMBED, *LAYERS, HEAD], compute, grad, keeps, 2, 0, 0)


def cost(of=None, plan=KEEP_ALL, tokens=(32, 32), as_landed=False, rates=RATES):
    return step_cost(of or needs(), plan, tokens, token_bytes=10, times=TIMES, rates=rates, as_landed=as_landed)


def test_copies_take_the_bytes_that_slots_and_gradients_really_move():
    embed, layer, _, _, head = cost().blocks
    assert (embed.load_s, layer.load_s, head.load_s) == (8.192 * 2, 6.144 * 2, (2.048 + 6.4) * 2)
    assert (embed.drain_s, layer.drain_s, head.drain_s) == (6.4 * 2 * 2, 4.096 * 2 * 2, (0.064 + 6.4) * 2 * 2)
    assert (embed.add_s, layer.add_s, head.add_s) == (6.4 * 2, 0, 0)  # the head's share of the table comes back
    assert (embed.buffers, layer.buffers, head.buffers) == ((0,), (1,), (4, 0))


def test_in_fp32_both_halves_go_up_and_gradients_are_twice_as_large():
    layer = cost(needs(torch.float32, torch.float32)).blocks[1]
    assert (layer.load_s, layer.drain_s) == (6.144 * 4, 4.096 * 4 * 2)
    joining = replace(RATES, joins_per_s=1000.0)
    assert cost(needs(torch.float32, torch.float32), rates=joining).blocks[1].load_s == 6.144 * 4 + 6.144
    assert cost(rates=joining).blocks[1].load_s == 6.144 * 2  # bf16 is what lies there


def test_a_sum_is_cast_and_measured_and_a_single_gradient_only_measured():
    per_element = {
        (torch.bfloat16, (32, 32)): 4 + 2 + 2, (torch.bfloat16, (64,)): 2, (torch.float32, (32, 32)): 4,
    }  # fmt: skip
    for (grad, tokens), num_bytes in per_element.items():
        assert cost(needs(grad=grad), tokens=tokens).blocks[1].close_s == pytest.approx(0.4096 * num_bytes)
    assert cost(tokens=(64,)).blocks[4].close_s == pytest.approx(0.6464 * 8)  # the head sums over chunks of tokens


def test_passes_follow_the_tokens_of_each_micro_batch():
    embed, layer, _, _, head = cost(tokens=(32, 16)).blocks
    assert (embed.forward_s, embed.backward_s) == ((1, 0.5), (2, 1))
    assert (layer.forward_s, layer.backward_s) == ((3, 1.5), (9, 4.5))
    assert (head.forward_s, head.backward_s) == ((0, 0), (8, 4))


def test_layers_take_what_their_way_of_keeping_takes():
    kept = replace(KEEP_ALL, recompute={2: SELECTIVE, 3: NONE}, offloaded=frozenset({1}))
    layers = cost(plan=kept, tokens=(32,)).blocks[1:4]
    assert [(lay.forward_s[0], lay.backward_s[0]) for lay in layers] == [(3, 9), (3, 7), (3.5, 6)]
    assert [lay.offloads for lay in layers] == [True, False, False]


def test_boundaries_cross_the_link_with_the_tokens_they_are_of():
    step = cost(tokens=(32, 16))
    assert (step.save_s, step.return_s) == ((0.64, 0.32), (0.32, 0.16))


def test_when_updates_begin_and_how_many_buffers_gradients_have():
    exact, speculative = cost(), cost(as_landed=True)
    streamed = cost(needs(keeps=False), as_landed=True)  # without clipping, or with that of the step before
    assert [(c.as_landed, c.hbm_as_landed, c.ring) for c in (exact, speculative, streamed)] == [
        (False, False, None), (True, False, None), (True, True, 3),
    ]  # fmt: skip
    assert [b.update.work_s for b in exact.blocks] == [81.92, 40.96, 40.96, 40.96, 20.48]


def test_what_is_in_hbm_crosses_no_link_and_is_updated_at_the_device_s_rate():
    embed, layer, _, _, head = cost(replace(needs(), in_hbm=frozenset({0, 1}))).blocks
    assert [b.in_hbm for b in (embed, layer, head)] == [True, True, False]
    for block in (embed, layer):
        assert (block.load_s, block.drain_s, block.add_s) == (0, 0, 0)
    assert layer.update.work_s == pytest.approx((2 * (6.144 * 4 + 4.096 * 8) + 4.096 * 2) / 10)
    assert (head.load_s, head.drain_s) == (2.048 * 2, 0.064 * 2 * 2)  # what it borrows is there already


def test_blocks_below_the_first_that_trains_only_run_forward():
    frozen = place_block(0, "embed", [ParamSpec("e", "e", (100, 64), False)])
    head = place_block(4, "head", [ParamSpec("n", "n", (64,))], [("lm", 0, frozen.params[0])])
    some = MemoryNeeds([frozen, *LAYERS, head], torch.bfloat16, torch.bfloat16, True, 2, 0, 0)
    step = cost(some)
    assert step.first == 1
    assert (step.blocks[0].update.work_s, step.blocks[0].buffers, step.blocks[4].buffers) == (0, (), (4,))


def on_disk(of, *states, blocks=range(5)):
    places = {(name, b): Tier.nvme for name in states for b in blocks if of.layouts[b].num_elements}
    return replace(of, placed={**of.placed, **places})


DISK = replace(RATES, disk=DiskRates(read=1000.0, write=500.0))


def test_what_an_update_moves_between_disk_and_memory():
    placed = on_disk(needs(), "exp_avg", "exp_avg_sq", blocks=(1, 4))
    embed, layer, other, _, head = cost(placed, rates=DISK).blocks
    assert (embed.update.pages, other.update.pages) == (0, 0)
    assert layer.update == UpdateCost(work_s=40.96, pages=1, read_s=4.096 * 8, write_s=4.096 * 8 * 2)
    # Of 2048 elements both moments are two disk blocks each.
    assert head.update == UpdateCost(work_s=20.48, pages=1, read_s=4 * 4.096, write_s=8 * 4.096)
    assert [block.staging_s for block in (embed, layer, head)] == [0, 0, 0]


def test_weights_on_disk_are_read_for_every_load_and_published_when_they_are_written():
    _, layer, _, _, head = cost(on_disk(needs(), "weights", "residual"), rates=DISK).blocks
    assert (layer.staging_s, layer.update.read_s, layer.update.loaded) == (12.288, 4 * 4.096, True)
    assert head.staging_s == 4.096 + 16.384  # of what it borrows, whole disk blocks: 6400 elements of 2 bytes
    full = cost(on_disk(needs(torch.float32, torch.float32), "weights", "residual"), rates=DISK).blocks[1]
    assert full.staging_s == 2 * 12.288  # both halves
    residual = cost(on_disk(needs(), "residual"), rates=DISK).blocks[1]
    assert (residual.staging_s, residual.update.loaded) == (0, False)


def test_pages_of_large_models_are_simulated_several_at_a_time(monkeypatch):
    monkeypatch.setattr("horizon.plan.disk.PAGE_ELEMENTS", 1024)
    placed = on_disk(needs(), "exp_avg")
    step = cost(placed, rates=DISK)
    assert ([b.update.pages for b in step.blocks], step.page_buffers) == ([8, 4, 4, 4, 2], 12)
    monkeypatch.setattr("horizon.plan.cost.SIMULATED_PAGES", 8)
    few = cost(placed, rates=DISK)
    assert ([b.update.pages for b in few.blocks], few.page_buffers) == ([3, 2, 2, 2, 1], 4)
    for one, other in zip(step.blocks, few.blocks, strict=True):
        assert (one.update.read_s, one.update.write_s) == (other.update.read_s, other.update.write_s)


def test_the_disk_moves_what_the_traffic_of_a_step_is():
    placed = on_disk(needs(), "weights", "residual", "exp_avg", "exp_avg_sq")
    blocks, traffic = cost(placed, rates=DISK).blocks, least_traffic(placed)
    assert sum(b.update.write_s for b in blocks) * 500 == pytest.approx(traffic["disk", "write"])
    loads = [*blocks, *blocks[:-2]]  # the last layer and the head stay through the turn
    read = sum(b.update.read_s for b in blocks) + sum(b.staging_s for b in loads)
    assert read * 1000 == pytest.approx(traffic["disk", "read"])


def test_gradients_on_disk_move_what_the_traffic_of_a_step_is():
    placed = on_disk(needs(), "grads")
    blocks, traffic = cost(placed, rates=DISK).blocks, least_traffic(placed)
    assert sum(block.spill_s for block in blocks) * 500 == pytest.approx(traffic["disk", "write"])
    assert sum(block.update.gradient_s for block in blocks) * 1000 == pytest.approx(traffic["disk", "read"])
    assert [block.update.gradient_s for block in blocks] == [0, 0, 0, 8.192, 4.096]  # the first are in memory still
    some = cost(on_disk(needs(), "grads", blocks=(1, 4)), rates=DISK).blocks
    assert [block.spill_s for block in some] == [None, 16.384, None, None, 8.192]
    assert [block.update.gradient_s for block in some] == [None, 0, None, None, 0]
    assert {block.spill_s for block in cost(placed).blocks} == {None}  # nothing is known of the disk


def test_boundaries_on_disk_move_whole_disk_blocks():
    away = replace(KEEP_ALL, offloaded=frozenset({1, 2}), tier=Tier.nvme)
    step = cost(plan=away, tokens=(32, 1000), rates=DISK)
    assert (step.write_s, step.read_s) == ((8.192, 3 * 8.192), (4.096, 3 * 4.096))
    assert cost(plan=replace(away, tier=Tier.dram), rates=DISK).write_s == cost(plan=away).write_s == ()


def predicted(rates=RATES, of=None, **changes):
    of = of or needs(**changes)
    return predict_step(step_cost(of, KEEP_ALL, [32, 32], 10, TIMES, rates, not of.keeps_gradients), 64)


def test_the_bound_is_what_a_step_waits_for():
    fast = replace(RATES, up_bytes_per_s=1e9, down_bytes_per_s=1e9, device_bytes_per_s=1e9, updates_per_s=1e9)
    assert predicted(fast).bound == "arithmetic"
    assert predicted(replace(fast, updates_per_s=100)).bound == "host memory bandwidth"
    assert predicted(replace(fast, up_bytes_per_s=100)).bound == "link"
    moments = on_disk(needs(), "exp_avg", "exp_avg_sq")
    slow = predicted(replace(fast, disk=DiskRates(1000.0, 1000.0)), moments)
    assert slow.bound == "disk" and slow.seconds > 2 * 8 * 20.544  # 20,544 parameters, read and written
    assert predicted(fast).arithmetic_s == pytest.approx(2 * (1 + 2 + 3 * (3 + 9) + 8), rel=1e-3)


def test_updates_inside_the_backward_save_what_it_hides():
    slow = replace(RATES, up_bytes_per_s=1e9, down_bytes_per_s=1e9, device_bytes_per_s=1e9, updates_per_s=200)
    assert predicted(slow, keeps=False).seconds < predicted(slow).seconds


def test_the_plan_s_table_ends_with_the_prediction():
    prediction = StepPrediction(num_tokens=4000, arithmetic_s=1.5, link_s=0.02, optimizer_s=0.475, launch_s=0.005)
    plan = plan_memory(needs(), Limits(1 << 40, 1 << 40))
    assert plan.with_activations((), prediction).table().splitlines()[-1] == (
        "  predicted step 2.00 s, 2,000 tokens/s, bound by host memory bandwidth: arithmetic 1.50 s, waiting for link "
        "20 ms, optimizer 475 ms, launches 5 ms"
    )
    waiting = replace(prediction, disk_s=1.0)
    assert waiting.seconds == 3 and waiting.bound == "disk"
    assert waiting.describe().endswith("optimizer 475 ms, disk 1.00 s, launches 5 ms")
    assert "predicted step" not in plan.with_activations(()).table()
