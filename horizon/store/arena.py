"""Host memory for states: anonymous huge-page mappings on chosen NUMA nodes, registered with CUDA by region.

The order of a mapping's life is that of `horizon.store.numa`: mapped, huge pages asked for, bound to its nodes, touched
by all cores, looked up, registered.

Where CUDA refuses to register a region, all of the arena stays pageable, and the log says so: the host then waits for
copies from and to it.

Never per-tensor pinning: torch's pinned allocator rounds each request up to a power of two. A region is one
registration, so that it can be given back alone and one copy never straddles two. Order of release matters: memory
that is unmapped while still registered makes a later, unrelated registration fail.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from horizon.errors import BudgetError
from horizon.store import numa
from horizon.units import GIB, MIB, align_up, format_bytes

logger = logging.getLogger(__name__)

HUGE_PAGE = 2 * MIB
PIECE = 16 * GIB  # of a mapping; larger only where one region is
REGION_ALIGN = 4096
MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h; Python's mmap does not name it, and holds the GIL in the call


class Arena:
    """Regions of host memory that live and die together.

    Args:
        sizes: bytes of each region; zero is allowed.
        purpose: named in errors.
        pin: register with CUDA, so that copies to and from the device are asynchronous.
        nodes: NUMA nodes that the pages come from, in turn; none: where the kernel puts them.

    Attributes:
        pinned: they are.

    Raises:
        BudgetError: the operating system refuses the memory, or the nodes have no room.
        ConfigError: memory cannot be bound to these nodes.
    """

    def __init__(self, sizes: Sequence[int], purpose: str, pin: bool, nodes: Sequence[int] = ()):
        self._mappings: list[mmap.mmap] = []
        self._registered: list[int] = []
        self._views: list[Tensor] = []
        self._places: list[tuple[mmap.mmap, int]] = []  # of each region: its mapping, and where it starts there
        self.pinned, self.nodes = pin, tuple(nodes)
        try:
            for piece in _pieces([align_up(size, REGION_ALIGN) for size in sizes]):
                self._map(piece, purpose)
            if pin:
                self._register(purpose)
        except BaseException:
            self.close()
            raise
        self.regions: list[Tensor] = [view[:size] for view, size in zip(self._views, sizes, strict=True)]
        self.num_bytes = sum(len(m) for m in self._mappings)

    def _map(self, sizes: list[int], purpose: str) -> None:
        num_bytes = align_up(max(sum(sizes), 1), HUGE_PAGE if sum(sizes) >= HUGE_PAGE else REGION_ALIGN)
        try:
            mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise BudgetError(
                f"the system refuses {format_bytes(num_bytes)} of host memory for {purpose} ({error.strerror}); "
                "use a smaller model or free memory"
            ) from error
        self._mappings.append(mapping)
        if hasattr(mmap, "MADV_HUGEPAGE") and num_bytes >= HUGE_PAGE:
            try:
                mapping.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                logger.debug("huge pages are not available for %s", purpose)
        flat = torch.frombuffer(mapping, dtype=torch.uint8)
        if self.nodes:
            numa.bind(flat.data_ptr(), num_bytes, self.nodes, purpose)
        if self.nodes or self.pinned:
            flat.zero_()  # first touch by all cores; registration alone would fault pages in on one
        if self.nodes:
            numa.verify(flat.data_ptr(), num_bytes, self.nodes, purpose)
        start = 0
        for view in torch.split(flat[: sum(sizes)], sizes):
            self._views.append(view)
            self._places.append((mapping, start))
            start += view.numel()

    def _register(self, purpose: str) -> None:
        for view in self._views:
            if not view.numel():
                continue
            status = int(_cudart().cudaHostRegister(view.data_ptr(), view.numel(), 1))  # 1: portable
            if status != 0:
                self._unregister()
                self.pinned = False
                forget_cuda_error()
                logger.warning(
                    "CUDA refuses to register %s of host memory for %s (status %d): all of it stays pageable, and the "
                    "host waits for its copies; raise the locked-memory limit (ulimit -l) or that of the container",
                    format_bytes(view.numel()), purpose, status,
                )  # fmt: skip
                return
            self._registered.append(view.data_ptr())

    def _unregister(self) -> None:
        for pointer in self._registered:
            _cudart().cudaHostUnregister(pointer)
        self._registered.clear()

    def populate(self, start: int, stop: int) -> bool:
        """Have these bytes' pages there now, with what they hold; False where the kernel (before 5.14) cannot.

        Other threads may use the memory, and run, meanwhile. Only of an arena that is one mapping.
        """
        (mapping,) = self._mappings
        address = ctypes.c_void_p(torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() + start)
        return int(ctypes.CDLL(None).madvise(address, ctypes.c_size_t(stop - start), MADV_POPULATE_WRITE)) == 0

    def release(self, index: int) -> None:
        """Give one region's pages back before the others go; its views must no longer be used."""
        view, (mapping, start) = self._views[index], self._places[index]
        if not view.numel():
            return
        if view.data_ptr() in self._registered:
            _cudart().cudaHostUnregister(view.data_ptr())
            self._registered.remove(view.data_ptr())
        mapping.madvise(mmap.MADV_DONTNEED, start, view.numel())
        self.num_bytes -= view.numel()
        self.regions[index] = self._views[index] = view[:0]

    def close(self) -> None:
        """Unregister and unmap. Idempotent; views must no longer be used."""
        self._unregister()
        self.regions, self._views, self._places = [], [], []
        for mapping in self._mappings:
            # The pages go now, the address range with its last view: closing it would not ask whether one is alive.
            mapping.madvise(mmap.MADV_DONTNEED)
        self._mappings.clear()


def forget_cuda_error() -> None:
    """Have the next kernel not fail for a call that CUDA has refused: the error waits for whoever asks next."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda").add_(1)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _pieces(sizes: list[int]) -> list[list[int]]:
    """Consecutive regions grouped so that each group stays below `PIECE` bytes where it can."""
    pieces: list[list[int]] = []
    for size in sizes:
        if pieces and sum(pieces[-1]) + size <= PIECE:
            pieces[-1].append(size)
        else:
            pieces.append([size])
    return pieces
