"""Where the activations of a step go: which boundaries leave for the host, and which blocks keep more than a boundary.

Pure arithmetic, as `horizon.plan.memory`; what a block takes and keeps was measured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from horizon.config.schema import Recompute, Tier
from horizon.errors import BudgetError
from horizon.plan.disk import BOUNDARY_BUFFERS, map_boundaries
from horizon.plan.memory import Line, MemoryPlan, check_fits, host_lines
from horizon.units import GIB, align_up

Key = tuple[int, int]  # block that takes the hidden states as input, micro-batch
BORROW_ALIGN = 256
LOOKAHEAD = 2  # offloaded boundaries on their way back while one is being used
EFFICIENT_TOKENS = 8192  # below, a block's kernels no longer fill a large GPU
# Tokens whose arithmetic takes as long as what one micro-batch more costs, sums of gradients and smaller products: by
# passes timed on an H200.
SUMMING_TOKENS = 350
FRAGMENTS = 16  # of what graphs hold, the allocator loses one more such part between tensors of many sizes
KEPT_FRAGMENTS = 128  # of linear outputs, it loses less
WORTHWHILE = 2 * GIB  # of host memory: to save less, micro-batches are not made smaller


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """Device bytes that running one block takes, as measured: a line in the micro-batch's tokens, or the head."""

    base: int
    per_token: int
    least: int  # a chunk of the head
    kept_selective: int = 0  # per token, what a layer keeps besides its boundary; 0: not measured
    kept_none: int = 0  # per token, what a layer's graph holds, its boundary included; 0: not measured

    def at(self, tokens: int) -> int:
        """Bytes at a micro-batch of `tokens` tokens."""
        return max(self.least, self.base + self.per_token * tokens)

    def beside_kept(self, tokens: int, num_selective: int, step_tokens: int) -> int:
        """Bytes at work while so many layers' linear outputs of `step_tokens` tokens are kept, or after that.

        The first layer to take them back works with its own, which are counted already; where layers run again with
        nothing kept, these outputs are gone.
        """
        own, lost = tokens * self.kept_selective, num_selective * step_tokens * self.kept_selective // KEPT_FRAGMENTS
        return max(self.least, self.at(tokens) - max(0, own - lost)) if num_selective else self.at(tokens)

    def turning(self, layers: int, tokens: int) -> int:
        """Bytes that layers at the turn and what works beside them hold: the head, or the last of them and no head."""
        graph = tokens * self.graph_per_token
        return max(layers * graph + self.least, max(layers - 1, 0) * graph + self.at(tokens)) if layers else 0

    @property
    def graph_per_token(self) -> int:
        """Bytes that a kept graph takes, with what the allocator loses."""
        return self.kept_none * (1 + FRAGMENTS) // FRAGMENTS


@dataclass(frozen=True, slots=True)
class ActivationPlan:
    """Where the activations of one batch shape go. From the first layer to the last:

    | boundary on the device | boundary on the host | graph kept on the device | at the turn |

    and of the layers before the kept graphs, the last ones keep the outputs of their linear layers, too. Layers at the
    turn keep their graph as well, of one micro-batch at a time.
    """

    offloaded: frozenset[int]  # blocks whose input is kept on the host
    recompute: Mapping[int, Recompute]  # of the blocks that keep more than a boundary
    lines: tuple[Line, ...]
    tier: Tier = Tier.dram  # of the offloaded boundaries

    @property
    def on_nvme(self) -> bool:
        """Whether boundaries go there."""
        return self.tier is Tier.nvme and bool(self.offloaded)

    @property
    def host_bytes(self) -> int:
        """Bytes of boundaries off the device that found no idle gradient buffer, and of what they are staged in."""
        return sum(line.num_bytes for line in self.lines if line.tier != "device")


@dataclass(frozen=True, slots=True)
class _Room:
    """Device bytes for what layers keep, and what each kind of keeping takes for a whole step."""

    num_layers: int
    num_bytes: int
    boundary: int
    selective: int  # besides the boundary
    graph: int  # boundary included
    at_work: Callable[[int], int]  # beside so many layers' linear outputs

    def offloaded(self, num_graphs: int, num_selective: int) -> int:
        """Boundaries that must leave for the host; more than there are where not even that is enough."""
        kept = num_graphs * self.graph + num_selective * self.selective
        left = self.num_bytes - kept - self.at_work(num_selective)
        layers = self.num_layers - num_graphs
        return layers + 1 if left < 0 else max(0, layers - left // max(self.boundary, 1))


def plan_activations(
    plan: MemoryPlan,
    tokens: Sequence[int],
    token_bytes: int,
    working: WorkingSet,
    idle: Sequence[int],
    recompute: Recompute = Recompute.full,
) -> ActivationPlan:
    """Decide which boundaries stay on the device, and with `auto` how many layers keep more than that.

    Boundaries leave for the host before a layer has to be recomputed, as long as idle gradient buffers take them.
    Keeping the outputs of linear layers saves more time per byte than keeping the whole graph, which comes last.

    Args:
        plan: without activations.
        tokens: tokens of each micro-batch of the step.
        token_bytes: bytes of one token's hidden state.
        working: what a block's recompute and backward need.
        idle: per block the bytes of its gradient buffer on the host, which boundaries may borrow; 0 where not.
        recompute: the same for all layers, or auto.

    Raises:
        BudgetError: not even with all boundaries on the host.
    """
    num_layers, boundary = plan.num_blocks - 2 - plan.turn_layers, sum(tokens) * token_bytes
    passing = 3 * boundary  # entering a block, leaving it, and the gradient on its way down
    turning = working.turning(plan.turn_layers, max(tokens))
    busy = partial(working.beside_kept, max(tokens), step_tokens=sum(tokens))
    room = _Room(
        num_layers,
        plan.limits.device - plan.num_bytes("device") - passing,
        boundary,
        sum(tokens) * working.kept_selective,
        sum(tokens) * working.graph_per_token,
        lambda num_selective: max(busy(num_selective), turning),
    )

    def offloaded_lines(num_graphs: int, num_selective: int) -> list[Line]:
        away = _offloaded(room, num_graphs, num_selective)
        return _offloaded_lines(plan, boundary_sizes(away, tokens, token_bytes), idle)

    def own(num_graphs: int, num_selective: int) -> int:
        """Bytes that boundaries off the device take beyond idle buffers."""
        return sum(line.num_bytes for line in offloaded_lines(num_graphs, num_selective))

    num_graphs, num_selective = _kept_layers(room, recompute, own)
    away = _offloaded(room, num_graphs, num_selective)
    block = busy(num_selective)
    lines = (
        *offloaded_lines(num_graphs, num_selective),
        Line("device", f"block at work ({max(tokens)} tokens)", block),
        Line("device", "hidden states", passing),
        *([Line("device", f"graphs of {plan.turn_layers} turn layers", turning - block)] if turning > block else []),
        *_kept_lines(room, num_graphs, num_selective),
    )
    fixed = recompute not in (Recompute.auto, Recompute.full)
    remedy = f"memory.recompute=auto instead of {recompute}, " if fixed else ""
    check_fits(plan.with_activations(lines), f"{remedy}a smaller train.micro_batch or train.batch_size")
    kept = _recomputed(1 + num_layers - num_graphs, num_selective, plan.num_blocks)
    return ActivationPlan(away, kept, lines, plan.boundaries)


def _recomputed(first_graph: int, num_selective: int, num_blocks: int) -> dict[int, Recompute]:
    """What the layers that keep more than a boundary run again."""
    kept = {block: Recompute.selective for block in range(first_graph - num_selective, first_graph)}
    return kept | {block: Recompute.none for block in range(first_graph, num_blocks - 1)}


def _offloaded_lines(plan: MemoryPlan, sizes: Mapping[Key, int], idle: Sequence[int]) -> list[Line]:
    """Boundaries on nvme, or those on the host that find no idle buffer."""
    if plan.boundaries is Tier.nvme:
        on_disk = map_boundaries(sizes)
        return [
            Line("host", "nvme staging, activations", BOUNDARY_BUFFERS * on_disk.largest),
            Line("nvme", "offloaded activations", on_disk.num_bytes),
        ]
    cxl, num_bytes = plan.limits.cxl, own_bytes(sizes, idle)
    dram, away = (0, num_bytes) if cxl.boundaries else (num_bytes, 0)
    return host_lines(cxl, "offloaded activations", dram, away)


def _kept_lines(room: _Room, num_graphs: int, num_selective: int) -> list[Line]:
    """What the layers keep on the device."""
    on_device = room.num_layers - num_graphs - len(_offloaded(room, num_graphs, num_selective))
    lines = [Line("device", f"boundaries of {on_device} blocks", on_device * room.boundary)]
    if num_selective:
        lines.append(Line("device", f"linear outputs of {num_selective} blocks", num_selective * room.selective))
    if num_graphs:
        lines.append(Line("device", f"graphs of {num_graphs} blocks", num_graphs * room.graph))
    return lines


def _offloaded(room: _Room, num_graphs: int, num_selective: int) -> frozenset[int]:
    """Blocks whose boundary leaves for the host: the last of those that have one.

    Gradient buffers of the blocks below these are idle until the boundaries have come back.
    """
    layers = room.num_layers - num_graphs
    num_offloaded = min(layers, room.offloaded(num_graphs, num_selective))
    return frozenset(range(1 + layers - num_offloaded, 1 + layers))


def _kept_layers(room: _Room, recompute: Recompute, own: Callable[[int, int], int]) -> tuple[int, int]:
    """(layers that keep their graph, layers that keep the outputs of their linear layers)."""
    layers = room.num_layers
    if recompute is Recompute.full:
        return 0, 0
    if recompute is Recompute.selective:
        return 0, layers
    if recompute is Recompute.none:
        return layers, 0

    allowed = own(0, 0)

    def fits(num_graphs: int, num_selective: int) -> bool:
        enough = room.offloaded(num_graphs, num_selective) <= layers - num_graphs
        return enough and own(num_graphs, num_selective) <= allowed

    selective = _most(layers, lambda n: fits(0, n)) if room.selective else 0
    if selective < layers or not room.graph:
        return 0, selective
    graphs = _most(layers, lambda n: fits(n, layers - n))
    return graphs, layers - graphs


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest n <= limit that fits, where 0 does and more never fits better."""
    return bisect_left(range(1, limit + 1), True, key=lambda n: not fits(n))


def boundary_sizes(offloaded: Iterable[int], tokens: Sequence[int], token_bytes: int) -> dict[Key, int]:
    """Bytes of every offloaded boundary, by (block, micro-batch)."""
    return {(block, m): num * token_bytes for block in offloaded for m, num in enumerate(tokens)}


def choose_micro_batch(
    plans: Sequence[MemoryPlan],
    batch_size: int,
    seq_len: int,
    token_bytes: int,
    working: WorkingSet,
    idle: Sequence[int],
    recompute: Recompute = Recompute.full,
) -> int:
    """Rows per micro-batch, a divisor of `batch_size`: as many as fit without host memory of their own for activations.

    Large ones save launches and gradient sums, until the block at work pushes boundaries out to the host, or takes the
    room in which layers could keep what they need for their backward.

    Args:
        plans: without activations; they differ in the layers at the turn, whose number ascends.

    Raises:
        BudgetError: not even one row fits.
    """
    best: tuple[tuple[bool, int, float], int] | None = None

    def too_small(rows: int) -> bool:
        return rows * seq_len < EFFICIENT_TOKENS and rows < batch_size

    def rank(plan: MemoryPlan, rows: int) -> tuple[bool, int, float]:
        tokens = [rows * seq_len] * (batch_size // rows)
        planned = plan_activations(plan, tokens, token_bytes, working, idle, recompute)
        forwards = (plan.num_blocks - 2) * 4 * (1 + SUMMING_TOKENS / tokens[0]) - len(planned.recompute)
        return too_small(rows), planned.host_bytes // WORTHWHILE, forwards

    for rows in (rows for rows in range(1, batch_size + 1) if batch_size % rows == 0):
        try:
            found = rank(plans[0], rows)
        except BudgetError:
            if rows == 1:
                raise
            break  # more rows need more
        with suppress(BudgetError):  # more layers need more, too
            for plan in plans[1:] if not too_small(rows) else ():
                found = min(found, rank(plan, rows))
        if best is None or found < best[0]:
            best = found, rows
    assert best is not None
    return best[1]


class Piece(NamedTuple):
    """A range of one block's gradient buffer."""

    buffer: int
    offset: int
    num_bytes: int


def borrow(sizes: Mapping[Key, int], idle: Sequence[int]) -> tuple[dict[Key, list[Piece]], dict[Key, int]]:
    """Place offloaded boundaries in idle gradient buffers, cut into pieces where one buffer has too little room.

    A boundary that enters block b is written after the previous step's updates of blocks below b are done (the forward
    waited for them) and read back before gradients of blocks below b are drained: it may lie in those buffers.

    Args:
        sizes: bytes of each boundary.
        idle: bytes of each block's gradient buffer, 0 where it is not idle.

    Returns:
        per boundary its pieces, in order, and the bytes at its end that found no room.
    """
    room = [num_bytes // BORROW_ALIGN * BORROW_ALIGN for num_bytes in idle]
    placed: dict[Key, list[Piece]] = {}
    homeless: dict[Key, int] = {}
    first = 0  # with room: earlier ones are full, and there are many keys
    for key in sorted(sizes):
        rest, placed[key] = sizes[key], []
        while first < len(room) and not room[first]:
            first += 1
        for buffer in range(first, min(key[0], len(idle))):
            if not rest:
                break
            if room[buffer]:
                take = min(rest, room[buffer])
                offset = idle[buffer] // BORROW_ALIGN * BORROW_ALIGN - room[buffer]
                placed[key].append(Piece(buffer, offset, take))
                room[buffer] -= align_up(take, BORROW_ALIGN)
                rest -= take
        if rest:
            homeless[key] = rest
    return placed, homeless


def own_bytes(sizes: Mapping[Key, int], idle: Sequence[int]) -> int:
    """Host bytes that boundaries need beyond what they can `borrow`, which fills one buffer after another."""
    rooms = (num_bytes // BORROW_ALIGN * BORROW_ALIGN for num_bytes in idle)
    below = list(accumulate(rooms, initial=0))  # in the buffers of all blocks below one
    lent = own = 0
    for (block, _), num_bytes in sorted(sizes.items()):
        homeless = max(0, num_bytes - below[min(block, len(idle))] + lent)
        lent += align_up(num_bytes - homeless, BORROW_ALIGN)
        own += align_up(homeless, BORROW_ALIGN)
    return own
