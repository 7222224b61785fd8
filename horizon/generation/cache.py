"""Keys and values of a generation, in memory that was planned: transformers' cache, with places of fixed size.

A layer's place is [tokens, rows, heads, D], so that what a pass has read or added is one piece. Of a place on the host
the device sees a copy, in one buffer that all such layers share: they go through it one after the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from horizon.errors import UnsupportedModelError
from horizon.plan.kv_cache import LayerCache
from horizon.store.arena import Arena


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Keys and values of one token of one row."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    window: int | None

    @property
    def num_elements(self) -> int:
        """Of keys and values together."""
        return self.heads * (self.key_dim + self.value_dim)

    @property
    def cache(self) -> LayerCache:
        """As the plan sees it."""
        return LayerCache(self.num_elements * self.dtype.itemsize, self.window)


def shape_of(layer: Any, model: str) -> LayerShape:
    """What a layer of transformers' own cache holds after a pass.

    Raises:
        UnsupportedModelError: something else than keys and values of tokens.
    """
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys.dim() != 4:
        raise UnsupportedModelError(
            f"{model} keeps a {type(layer).__name__} between tokens, not only keys and values: generate cannot hold it"
        )
    _, heads, _, dim = layer.keys.shape
    window = layer.sliding_window if isinstance(layer, DynamicSlidingWindowLayer) else None
    return LayerShape(heads, dim, layer.values.shape[3], layer.keys.dtype, window)


class Place(Protocol):
    """Where one layer's keys and values are."""

    def read(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The first tokens' keys and values on the device, [tokens, rows, heads, D]."""

    def write(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put tokens from `start` on there; gives everything up to them, as `read`."""


class DevicePlace:
    """Memory of one kind: the device's."""

    def __init__(self, keys: Tensor, values: Tensor):
        self._both = keys, values

    def read(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        keys, values = self._both
        return keys[:num_tokens], values[:num_tokens]

    def write(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        end = start + len(keys)
        for place, new in zip(self._both, (keys, values), strict=True):
            place[start:end] = new
        return self.read(end)


class HostPlace:
    """Memory of the host, and device memory that other layers use in between."""

    def __init__(self, host: DevicePlace, borrowed: DevicePlace):
        self._host, self._borrowed = host, borrowed

    def read(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        both = self._borrowed.read(num_tokens)
        for target, source in zip(both, self._host.read(num_tokens), strict=True):
            target.copy_(source, non_blocking=True)
        return both

    def write(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """As the protocol says; what is before `start` must have been read since another layer was here."""
        end = start + len(keys)
        both = self._borrowed.write(start, keys, values)
        for target, source in zip(self._host.read(end), both, strict=True):
            target[start:].copy_(source[start:], non_blocking=True)
        return both


def _tokens_first(states: Tensor) -> Tensor:
    return states.permute(2, 0, 1, 3)


def _rows_first(states: Tensor) -> Tensor:
    return states.permute(1, 2, 0, 3)


class PlacedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer that sees all tokens before it."""

    def __init__(self, place: Place):
        super().__init__()  # type: ignore[no-untyped-call]
        self._place, self._length, self.is_initialized = place, 0, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add a pass's tokens [rows, heads, tokens, D]; gives all of them."""
        start, self._length = self._length, self._length + key_states.shape[2]
        self._place.read(start)
        keys, values = self._place.write(start, _tokens_first(key_states), _tokens_first(value_states))
        return _rows_first(keys), _rows_first(values)

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self._length


class PlacedSlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """A layer that sees a window: it keeps what the next token will see."""

    def __init__(self, place: Place, window: int):
        super().__init__(window)
        self._place, self._kept, self.is_initialized = place, 0, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add a pass's tokens [rows, heads, tokens, D]; gives them, and before them those kept."""
        self.cumulative_length += key_states.shape[2]
        new = _tokens_first(key_states), _tokens_first(value_states)
        keys, values = (torch.cat(pair) for pair in zip(self._place.read(self._kept), new, strict=True))
        self._kept = min(len(keys), self.sliding_window - 1)
        self._place.write(0, keys[len(keys) - self._kept :], values[len(keys) - self._kept :])
        return _rows_first(keys), _rows_first(values)


@contextmanager
def allocated(
    shapes: Sequence[LayerShape], rows: int, tokens: int, on_device: Collection[int], device: torch.device
) -> Iterator[Cache]:
    """A cache for `rows` rows of `tokens` tokens; its memory is given back at the end, when nothing uses it any more.

    Args:
        on_device: layers whose keys and values are there; the others' are on the host.

    Raises:
        BudgetError: the system refuses the memory.
    """
    sizes = [shape.cache.num_bytes(rows, tokens) for shape in shapes]
    on_host = [0 if layer in on_device else size for layer, size in enumerate(sizes)]
    borrowed = torch.empty(max(on_host), dtype=torch.uint8, device=device)
    arena = Arena(on_host, "keys and values", pin=device.type == "cuda")

    def cached(layer: int, shape: LayerShape) -> CacheLayerMixin:
        place: Place
        if layer in on_device:
            place = _place(torch.empty(sizes[layer], dtype=torch.uint8, device=device), shape, rows, tokens)
        else:
            place = HostPlace(*(_place(flat, shape, rows, tokens) for flat in (arena.regions[layer], borrowed)))
        return PlacedLayer(place) if shape.window is None else PlacedSlidingLayer(place, shape.window)

    try:
        yield Cache(layers=[cached(layer, shape) for layer, shape in enumerate(shapes)])
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # copies from and to the host are over
        arena.close()


def _place(flat: Tensor, shape: LayerShape, rows: int, tokens: int) -> DevicePlace:
    """Keys and values in these bytes."""
    values, start, both = flat.view(shape.dtype), 0, []
    for dim in (shape.key_dim, shape.value_dim):
        size = torch.Size((shape.cache.num_tokens(tokens), rows, shape.heads, dim))
        both.append(values[start : start + size.numel()].view(size))
        start += size.numel()
    return DevicePlace(*both)
