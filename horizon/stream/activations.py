"""The activations of steps: measured once per batch shape, planned, and given their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple

from torch import Tensor

from horizon.config.schema import Recompute
from horizon.plan.activations import (
    ActivationPlan,
    WorkingSet,
    boundary_sizes,
    choose_micro_batch,
    plan_activations,
)
from horizon.plan.memory import MemoryPlan
from horizon.store.offload import HostRegions, OffloadFile, OffloadSpace
from horizon.stream.boundaries import Boundaries
from horizon.stream.measure import measured_rows
from horizon.stream.streams import Streams

WorkingSetOf = Callable[[int, int, int, Set[Recompute]], WorkingSet]  # of a row's tokens, rows, version, what is kept


class StepSpace(NamedTuple):
    """Where one step's activations go."""

    boundaries: Boundaries
    recompute: Mapping[int, Recompute]  # of the blocks that keep more than a boundary


class Activations:
    """Decides per batch shape what stays on the device, and holds what leaves it.

    Attributes:
        kinds: what layers of a step may come to keep.

    Args:
        working_set: where a block's bytes come from: measured, or estimated for an engine that does not exist.
        on_cpu: `recompute=auto` is then `full`, for memory is what is scarce there.
        recompute: as configured.
        turns: some layers are at the turn, whatever `recompute` says.
        token_bytes: bytes of one token's hidden state.
        nodes: NUMA nodes of what leaves the device; none: where the kernel puts it.
        file: for what leaves it for nvme; None where nothing is run.
    """

    def __init__(
        self, working_set: WorkingSetOf, streams: Streams, on_cpu: bool, recompute: Recompute, token_bytes: int,
        turns: bool, nodes: Sequence[int] = (), file: OffloadFile | None = None,
    ):  # fmt: skip
        self._working_set_of, self._streams, self._token_bytes = working_set, streams, token_bytes
        self._recompute = Recompute.full if on_cpu and recompute is Recompute.auto else recompute
        every = self._recompute is Recompute.auto
        self.kinds = frozenset((Recompute.full, Recompute.selective, Recompute.none) if every else [self._recompute])
        if turns:
            self.kinds |= {Recompute.none}
        self._measured: dict[tuple[int, int], WorkingSet] = {}  # by tokens of a row, and rows
        self._plans: dict[tuple[object, ...], ActivationPlan] = {}
        self._offload, self._file = OffloadSpace(not on_cpu, nodes), file

    def choose_rows(
        self, fixed: Sequence[MemoryPlan], batch_size: int, seq_len: int, idle: Sequence[int], version: int
    ) -> int:
        """Rows per micro-batch for steps of `batch_size` rows, with one of these plans."""
        working = self._working_set(seq_len, batch_size, version)
        return choose_micro_batch(fixed, batch_size, seq_len, self._token_bytes, working, idle, self._recompute)

    def plan(
        self, fixed: MemoryPlan, shapes: Sequence[tuple[int, int]], idle: Sequence[int], version: int
    ) -> ActivationPlan:
        """The plan of a step whose micro-batches have these (rows, tokens).

        Args:
            fixed: the engine's plan, without activations.
            idle: per block the bytes of its gradient buffer that boundaries may borrow.
            version: the weights' version to measure with.
        """
        key = fixed, tuple(shapes), tuple(idle)
        if key not in self._plans:
            self._plans = {key: self.consider(fixed, shapes, idle, version)}  # steps look alike
        return self._plans[key]

    def consider(
        self, fixed: MemoryPlan, shapes: Sequence[tuple[int, int]], idle: Sequence[int], version: int
    ) -> ActivationPlan:
        """As `plan`, of a step that may never be taken."""
        return self._planned(fixed, shapes, idle, version, self._recompute)

    def num_bytes(
        self, fixed: MemoryPlan, shapes: Sequence[tuple[int, int]], idle: Sequence[int], version: int, keeps: bool
    ) -> tuple[int, int]:
        """(all host bytes of `fixed` and a step's activations, device bytes of these); arguments as for `plan`.

        `keeps`: with what layers may keep to be recomputed less; else without, where the plan has the choice.
        """
        recompute = Recompute.full if self._recompute is Recompute.auto and not keeps else self._recompute
        lines = self._planned(fixed, shapes, idle, version, recompute).lines
        device = sum(line.num_bytes for line in lines if line.tier == "device")
        return fixed.with_activations(lines).num_bytes("host"), device

    def boundaries(self, planned: ActivationPlan, tokens: Sequence[int], buffers: Sequence[Tensor]) -> Boundaries:
        """Places for a step's boundaries.

        `buffers`: per block its gradient buffer, empty where it may not be borrowed.
        """
        if not planned.offloaded:
            return Boundaries(self._streams, HostRegions({}))
        sizes = boundary_sizes(planned.offloaded, tokens, self._token_bytes)
        if planned.on_nvme:
            assert self._file is not None
            return Boundaries(self._streams, self._file.make_room(sizes))
        return Boundaries(self._streams, HostRegions(self._offload.regions(sizes, buffers)))

    def close(self) -> None:
        """Give host memory and disk back. Idempotent."""
        self._offload.close()
        if self._file is not None:
            self._file.close()

    def _planned(
        self,
        fixed: MemoryPlan,
        shapes: Sequence[tuple[int, int]],
        idle: Sequence[int],
        version: int,
        recompute: Recompute,
    ) -> ActivationPlan:
        tokens = [rows * length for rows, length in shapes]
        seq_len = max(length for _, length in shapes)
        working = self._working_set(seq_len, -(-max(tokens) // seq_len), version)
        return plan_activations(fixed, tokens, self._token_bytes, working, idle, recompute)

    def _working_set(self, seq_len: int, max_rows: int, version: int) -> WorkingSet:
        key = seq_len, measured_rows(seq_len, max_rows)
        if key not in self._measured:
            self._measured[key] = self._working_set_of(*key, version, self.kinds)
        return self._measured[key]
