"""Where the keys and values of generation go: the device first, layer by layer, then the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from horizon.plan.memory import Line, MemoryPlan, check_fits


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer keeps of each token of a row."""

    token_bytes: int  # keys and values, all heads
    window: int | None = None  # how many tokens a token sees at most, itself included; None: all before it

    def num_tokens(self, tokens: int) -> int:
        """How many of a row's tokens the layer keeps."""
        return tokens if self.window is None else min(tokens, self.window - 1)

    def num_bytes(self, rows: int, tokens: int) -> int:
        """Bytes for so many rows of so many tokens."""
        return rows * self.num_tokens(tokens) * self.token_bytes


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Which layers' keys and values are where, and the engine's memory with them."""

    on_device: frozenset[int]  # layers, from 0
    memory: MemoryPlan


def plan_cache(fixed: MemoryPlan, layers: Sequence[LayerCache], rows: int, tokens: int, working: int) -> CachePlan:
    """Place the keys and values of `rows` rows of `tokens` tokens.

    Layers on the host borrow one piece of device memory in turn, as large as the largest of them.

    Args:
        fixed: the engine's memory without them.
        working: device bytes that a forward pass takes besides.

    Raises:
        BudgetError: host and device together have no room for them; nothing is allocated.
    """
    sizes = [layer.num_bytes(rows, tokens) for layer in layers]
    room = fixed.limits.device - fixed.num_bytes("device") - working
    on_device: set[int] = set()
    borrowed = 0
    if sum(sizes) <= room:
        on_device, held = set(range(len(sizes))), sum(sizes)
    else:
        borrowed, held = max(sizes), 0
        for layer, size in enumerate(sizes):
            if held + size + borrowed <= room:
                on_device.add(layer)
                held += size
    num_away = len(sizes) - len(on_device)
    lines = [
        Line("device", "working memory of a pass", working),
        Line("device", f"keys and values of {len(on_device)} layers", held),
        Line("device", "keys and values on their way", borrowed),
        Line("host", f"keys and values of {num_away} layers", sum(sizes) - held),
    ]
    memory = fixed.with_activations([*fixed.activations, *lines])
    check_fits(memory, f"fewer than {rows} prompts at once, shorter ones, or a smaller max_new_tokens")
    return CachePlan(frozenset(on_device), memory)
