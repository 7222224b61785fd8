"""A layer's MLP in tiles of tokens, for micro-batches so long that its intermediate values would not fit.

An MLP maps each token on its own. Forward, only one tile's intermediate values exist at a time. In a recomputation the
MLP runs inside its backward, tile after tile; where it is the layer's last part, as in most models, nobody needs its
output before, and it runs no more often than without tiles. After ALST's tiled MLP, https://arxiv.org/abs/2506.13996.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from horizon.models.linear import GradientSums, Linears, replaced_forward

TILE = 16384  # tokens; larger ones would make no kernel faster


def takes_tiles(hidden: Tensor) -> bool:
    """Whether hidden states [..., H] are of more tokens than a tile."""
    return hidden.shape[:-1].numel() > TILE


def tiles(num_tokens: int) -> list[slice]:
    """The token ranges that an MLP takes one after the other."""
    return [slice(start, min(start + TILE, num_tokens)) for start in range(0, num_tokens, TILE)]


def find_mlp(layer: nn.Module) -> nn.Module | None:
    """The child of a decoder layer that is nothing but linear layers and activations, if there is one."""
    found = [m for m in layer.children() if "mlp" in type(m).__name__.lower() and _maps_each_token(m)]
    return found[0] if len(found) == 1 else None


def _maps_each_token(module: nn.Module) -> bool:
    inner = [m for m in module.modules() if m is not module]
    rest = [m for m in inner if type(m) is not nn.Linear]
    own = list(module.parameters(recurse=False)) + list(module.buffers())
    plain = all(not list(m.parameters()) and not isinstance(m, nn.Dropout) for m in rest)
    return len(inner) - len(rest) >= 2 and plain and not own


class TiledMlp:
    """One layer's MLP, replaced while a context is open."""

    def __init__(self, mlp: nn.Module, linears: Linears):
        self._mlp, self._linears = mlp, linears
        self._places: list[tuple[dict[str, Any], str]] = [
            (m._parameters, leaf) for m in mlp.modules() for leaf in m._parameters if m._parameters[leaf] is not None
        ]

    @contextmanager
    def forward_only(self) -> Iterator[None]:
        """While open, the MLP goes through its tokens tile by tile."""
        original = self._mlp.forward
        with replaced_forward(self._mlp, lambda x: _in_tiles(x, original)):
            yield

    @contextmanager
    def differentiating(self, sums: GradientSums, tail: nn.Linear | None) -> Iterator[None]:
        """While open, the MLP is one differentiable operation that keeps its input only."""
        original, ends_layer = self._mlp.forward, any(m is tail for m in self._mlp.modules())

        def run(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
            """The MLP with these weights, whatever is bound by now."""
            bound = [table[leaf] for table, leaf in self._places]
            try:
                for (table, leaf), weight in zip(self._places, weights, strict=True):
                    table[leaf] = weight
                with self._linears.differentiating(sums, tail=tail), replaced_forward(self._mlp, original):
                    return original(x)  # type: ignore[no-any-return]
            finally:
                for (table, leaf), before in zip(self._places, bound, strict=True):
                    table[leaf] = before

        def tiled(x: Tensor) -> Tensor:
            weights = [table[leaf] for table, leaf in self._places]
            return _Tiled.apply(x, run, not ends_layer, *weights)  # type: ignore[no-untyped-call, no-any-return]

        with replaced_forward(self._mlp, tiled):
            yield


class _Tiled(torch.autograd.Function):
    """`run` over tiles of the tokens of x [..., H]; its backward runs and differentiates one tile after the other."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, run: Callable[[Tensor, Sequence[Tensor]], Tensor], needs_output: bool, *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.run = run
        return _in_tiles(x, lambda tile: run(tile, weights)) if needs_output else torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        flat_x, flat_grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        grad_x = torch.empty_like(flat_x)
        sums: list[Tensor | None] = [None] * len(weights)  # of what no GradientSums takes: biases
        trained = [i for i, weight in enumerate(weights) if weight.requires_grad]
        for tile in tiles(len(flat_x)):
            leaf = flat_x[tile].unsqueeze(0).detach().requires_grad_()
            with torch.enable_grad():
                output = ctx.run(leaf, weights)
            wanted = [leaf, *(weights[i] for i in trained)]
            found = torch.autograd.grad(output, wanted, flat_grad[tile].unsqueeze(0), allow_unused=True)
            grad_x[tile] = found[0][0]
            for i, part in zip(trained, found[1:], strict=True):
                if part is not None:
                    total = sums[i]
                    sums[i] = part if total is None else total + part
        return grad_x.view(x.shape), None, None, *sums


def _in_tiles(x: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    output = torch.empty_like(flat)
    for tile in tiles(len(flat)):
        output[tile] = run(flat[tile].unsqueeze(0))[0]
    return output.view(x.shape)
