"""Recomputation that stops where backward has all it needs.

Most layers end in `residual + projection(x)`: backward needs the projection's input and weight, never its output. A
recomputation may then leave that one product out (6 % of a step of a Llama-like model). Whether a layer is of that
kind is found by watching one recomputation: nothing may be saved for backward after its last linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _UncomputedLinear(torch.autograd.Function):
    """`linear` with its ordinary backward and an output that holds no values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            flat_grad.mm(weight).view(x.shape) if wants_x else None,
            flat_grad.t().mm(flat_x) if wants_weight else None,
            flat_grad.sum(0) if wants_bias else None,
        )


@contextmanager
def without_output(linear: nn.Linear | None) -> Iterator[None]:
    """While open, `linear` computes nothing forward; its backward is as ever. None: nothing is left out."""
    if linear is None:
        yield
        return
    linear.__dict__["forward"] = lambda x: _UncomputedLinear.apply(x, linear.weight, linear.bias)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        del linear.__dict__["forward"]


def find_tail(layer: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, nn.Linear | None]:
    """Run a layer's forward under autograd and watch it.

    Returns:
        its output, and the linear layer whose output backward will never need, if there is one.
    """
    last: list[nn.Linear] = []
    saved_since: list[int] = [0]

    def on_linear(module: nn.Module, args: Any, output: Any) -> None:
        last[:] = [module]  # type: ignore[list-item]
        saved_since[0] = 0

    def on_save(tensor: Tensor) -> Tensor:
        saved_since[0] += 1
        return tensor

    handles = [m.register_forward_hook(on_linear) for m in layer.modules() if type(m) is nn.Linear]
    try:
        with torch.autograd.graph.saved_tensors_hooks(on_save, lambda tensor: tensor):
            output = run()
    finally:
        for handle in handles:
            handle.remove()
    return output, last[0] if last and saved_since[0] == 0 else None
