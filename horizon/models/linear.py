"""A block's linear layers and embedding tables, run so that a step does nothing twice.

Forward may keep the outputs of linear layers; a recomputation then takes them instead of multiplying again, and leaves
out the product whose output backward never needs. Backward puts each weight's gradient straight into its place in the
block's flat sum: no gradient tensor of its own, no separate pass that adds it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kept = Sequence[Tensor | None]  # outputs of a block's linear layers, in the order of their calls; None: not kept


class GradientSums(Protocol):
    """Where weight gradients are summed, by the parameter's local name."""

    def add_product(self, name: str, grad: Tensor, x: Tensor) -> None:
        """Add grad^T x; grad [N, out], x [N, in]."""

    def add_rows(self, name: str, rows: Tensor, grad: Tensor, padding_idx: int | None) -> None:
        """Add grad[i] [N, H] to row rows[i] [N]; rows that equal `padding_idx` get nothing."""


class _Linear(torch.autograd.Function):
    """`linear` whose weight gradient goes to `sums`; `output`, in a tuple, stands for what was computed before."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        name: str,
        sums: GradientSums,
        output: tuple[Tensor, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.name, ctx.sums = name, sums
        return output[0] if output else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        if wants_weight:
            ctx.sums.add_product(ctx.name, flat_grad, flat_x)
        grad_x = flat_grad.mm(weight).view(x.shape) if wants_x else None
        return grad_x, None, flat_grad.sum(0) if wants_bias else None, None, None, None


class _Embedding(torch.autograd.Function):
    """`embedding` whose gradient goes to `sums`, row by row."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, name: str, sums: GradientSums, padding_idx: int | None
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.name, ctx.sums, ctx.padding_idx = name, sums, padding_idx
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        (tokens,) = ctx.saved_tensors
        ctx.sums.add_rows(ctx.name, tokens.flatten(), grad.reshape(-1, grad.shape[-1]), ctx.padding_idx)
        return None, None, None, None, None


class Linears:
    """The plain linear layers and embedding tables of one block's module.

    Args:
        names: local names of the block's parameters; modules whose weight is not among them are left alone.
    """

    def __init__(self, module: nn.Module, names: Collection[str]):
        found = [(m, f"{path}.weight") for path, m in module.named_modules() if f"{path}.weight" in names]
        self._linears = [(m, name) for m, name in found if type(m) is nn.Linear and "forward" not in m.__dict__]
        self._tables = [(m, name) for m, name in found if _is_plain_table(m)]
        self._overwritten: frozenset[str] | None = None  # names whose output is changed in place by what follows

    @contextmanager
    def keeping(self, outputs: list[Tensor | None], tail: nn.Linear | None) -> Iterator[None]:
        """While open, the outputs of linear layers other than `tail` are appended to `outputs`.

        Fused kernels may overwrite an output in place (Liger's rotary embedding does), unseen by autograd. Which ones
        are is found by comparing with copies, once; of those, copies are kept.
        """
        seen: list[tuple[str, Tensor]] = []

        def kept(linear: nn.Linear, name: str, x: Tensor) -> Tensor:
            output = F.linear(x, linear.weight, linear.bias)
            if linear is tail:
                outputs.append(None)
            elif self._overwritten is None:
                seen.append((name, output))
                outputs.append(output.clone())
            else:
                outputs.append(output.clone() if name in self._overwritten else output)
            return output

        with ExitStack() as stack:
            for linear, name in self._linears:
                stack.enter_context(replaced_forward(linear, partial(kept, linear, name)))
            yield
        if self._overwritten is None:
            copies = [copy for copy in outputs if copy is not None]
            changed = {name for (name, live), copy in zip(seen, copies, strict=True) if not torch.equal(live, copy)}
            self._overwritten = frozenset(changed)

    @contextmanager
    def differentiating(self, sums: GradientSums, kept: Kept = (), tail: nn.Linear | None = None) -> Iterator[None]:
        """While open, weight gradients will go to `sums`; `kept` outputs and that of `tail` are not computed."""
        outputs = iter(kept)

        def multiplied(linear: nn.Linear, name: str, x: Tensor) -> Tensor:
            output = next(outputs, None)
            if linear is tail:
                output = x.new_empty(*x.shape[:-1], linear.out_features)
            before = () if output is None else (output,)
            return _Linear.apply(x, linear.weight, linear.bias, name, sums, before)  # type: ignore[no-untyped-call, no-any-return]

        def looked_up(table: nn.Embedding, name: str, tokens: Tensor) -> Tensor:
            return _Embedding.apply(tokens, table.weight, name, sums, table.padding_idx)  # type: ignore[no-untyped-call, no-any-return]

        with ExitStack() as stack:
            for linear, name in self._linears:
                stack.enter_context(replaced_forward(linear, partial(multiplied, linear, name)))
            for table, name in self._tables:
                stack.enter_context(replaced_forward(table, partial(looked_up, table, name)))
            yield


def find_tail(layer: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, nn.Linear | None]:
    """Run a layer's forward under autograd and watch which linear layer's output backward will never need.

    Most layers end in `residual + projection(x)`: backward needs the projection's input and weight only. A layer is of
    that kind if nothing is saved for backward after its last linear layer.

    Returns:
        its output, and that linear layer, if there is one.
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


def _is_plain_table(module: nn.Module) -> bool:
    """An embedding whose gradient is nothing but a sum of rows."""
    return type(module) is nn.Embedding and module.max_norm is None and not (module.scale_grad_by_freq or module.sparse)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, calling `module` calls `forward`."""
    before = module.__dict__.get("forward")  # fused kernels may have put theirs there
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
