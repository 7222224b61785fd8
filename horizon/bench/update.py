"""AdamW with its states on each memory: the experiment of the paper on CXL-aware allocation, with Horizon's own update.

`all`: every state on the place. `gradients`: the moments and the master in DRAM, only the gradients on the place, which
is how `cxl_aware` begins to spill. bf16 gradients, fp32 moments: 26 bytes are read or written a parameter.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch

from horizon.bench.places import Place, require_room
from horizon.optim.adamw import AdamW
from horizon.optim.pace import SimulatedPace
from horizon.optim.rate import update_seconds
from horizon.plan.memory import GRADS
from horizon.report.measurements import Row, Setting

BYTES_PER_PARAMETER = 26
HELD_BYTES = 14  # a parameter: two of weights, two of the master's rest, eight of moments, two of the gradient
NUM_ARRAYS, GRADS_AT = 5, 4  # as an update takes them: master, moments, gradient


def update(place: Place, dram: Place, sizes: Sequence[int], threads: Sequence[int], repeats: int) -> Iterator[Row]:
    """Parameters a second by their number and by threads.

    Raises:
        BudgetError: there is no room for so many.
    """
    for num_parameters in sizes:
        require_room(HELD_BYTES * num_parameters, place)
        for spread in ("all", "gradients") if place.cxl else ("all",):
            for num_threads in threads:
                times = _times(place, dram, spread, num_parameters, num_threads, repeats + 1)
                values = [num_parameters / seconds / 1e9 for seconds in times[1:]]  # the first takes the pages
                settings: dict[str, Setting] = {"states": spread, "parameters": num_parameters, "threads": num_threads}
                if place.bytes_per_s is not None:
                    settings["tier_gb_per_s"] = place.bytes_per_s / 1e9
                also = {"gb_per_s": statistics.median(values) * BYTES_PER_PARAMETER}
                yield Row.of(
                    "adamw", place.name, settings, "Gparam/s", values, also=also, simulated=place.simulated
                )  # fmt: skip


def _times(place: Place, dram: Place, spread: str, num_parameters: int, num_threads: int, sweeps: int) -> list[float]:
    def nodes(state: str, block: int) -> tuple[int, ...]:
        return place.nodes if spread == "all" or state == GRADS else dram.nodes

    pace = None
    if place.bytes_per_s is not None:
        shares = [1.0 if spread == "all" or i == GRADS_AT else 0.0 for i in range(NUM_ARRAYS)]
        pace = SimulatedPace(place.bytes_per_s, lambda block: shares, GRADS_AT)
    return update_seconds(num_parameters, num_threads, torch.bfloat16, AdamW(), nodes, pace, sweeps)
