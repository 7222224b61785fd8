"""What a step takes at least, which is known much sooner than what it takes (`horizon.plan.lanes`). Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from horizon.plan.lanes import StepCost


def least_seconds(step: StepCost) -> float:
    """What `run_steps` takes at least: a step is as long as its busiest lane, and as the updates that it waits for."""
    away = [cost for cost in step.blocks if not cost.in_hbm]
    updates = [cost.update for cost in away if cost.buffers]
    on_device = sum(cost.update.work_s for cost in step.blocks if cost.in_hbm and not step.hbm_as_landed)
    line = _compute_line(step)
    return max(
        line.end + max(on_device, step.host_s),  # the host goes on while kernels run
        sum(cost.load_s for cost in away),
        sum(cost.drain_s for cost in away),
        sum(update.work_s for update in updates),
        sum(update.read_s + update.write_s + (update.gradient_s or 0) for update in updates)
        + sum(cost.spill_s or 0 for cost in away if cost.buffers)
        + sum(cost.offloads for cost in step.blocks) * sum(step.write_s),
        _least_round(step, line),
    )


@dataclass(slots=True)
class _ComputeLine:
    """When compute comes to things that others wait for, should it never wait itself; from the start of a step."""

    end: float = 0.0
    begins: dict[int, float] = field(default_factory=dict)  # by block: its weights are needed
    landed: dict[int, float] = field(default_factory=dict)  # its gradient is on the host, at the earliest


def _compute_line(step: StepCost) -> _ComputeLine:
    head, line = len(step.blocks) - 1, _ComputeLine()
    turn = range(head - step.turn_layers, head + 1)

    def close(block: int) -> None:
        line.end += step.blocks[block].close_s
        line.landed[block] = line.end + step.blocks[block].drain_s

    for block in range(turn.start):
        line.begins[block] = line.end
        line.end += sum(step.blocks[block].forward_s)
    last = len(step.blocks[head].backward_s) - 1
    for m in range(last + 1):
        for block in turn:
            line.begins.setdefault(block, line.end)
            line.end += step.blocks[block].forward_s[m]
        for block in reversed(turn):
            line.end += step.blocks[block].backward_s[m]
            if m == last:
                close(block)
    for block in range(turn.start - 1, step.first - 1, -1):
        line.end += sum(step.blocks[block].backward_s)
        close(block)
    return line


def _least_round(step: StepCost, line: _ComputeLine) -> float:
    """From one step's gradient through the updates after it to the weights of a block, and on to the next gradient.

    Updates go from the head down as gradients land, or from the embedding up when all have.
    """
    longest = done = 0.0
    latest = -math.inf  # start of any block so far, before the work that is done
    for block, cost in enumerate(step.blocks):
        if cost.in_hbm or block not in cost.buffers:
            continue
        wanted = line.begins[block] - cost.load_s
        latest = max(latest, -wanted - done)
        done += cost.update.work_s
        longest = max(longest, line.landed[block] + done + latest if step.as_landed else line.end + done - wanted)
    return longest
