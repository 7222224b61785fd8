"""What a model's blocks multiply and hold, read off its modules' shapes: for plans of models that never run.

Numbers are per token of a micro-batch, in elements and multiply-adds, and know nothing of kernels or machines. What a
shape cannot tell (which input two projections share, what a custom module keeps) is taken to be as in a Llama layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from horizon.models.tiles import find_mlp

if TYPE_CHECKING:
    from horizon.models.blocks import BlockModel

_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class LayerWork:
    """What one decoder layer does with a token."""

    products: int  # multiply-adds with weights; of experts, those that a token goes through
    tail: int  # of these, those of the last projection, if a recomputation can leave them out
    attention: int  # elements of all query heads
    heads: int
    window: int | None  # positions that a token sees at most; None: all before it
    outputs: int  # elements that its linear layers give, the last one's left out
    graph: int  # elements that autograd keeps, with fused norms and activations
    plain: int  # elements more with torch's own
    norms: int  # elements that go through norms
    widest: int  # elements of the widest activation
    tiled: int  # elements of `graph` inside an MLP that takes long micro-batches in tiles
    materialises: bool  # attention forms the scores of all pairs of tokens


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What a model does with a token."""

    hidden_size: int
    vocab_size: int
    layers: tuple[LayerWork, ...]
    head: int  # multiply-adds of the head


class _Matrix(NamedTuple):
    path: str
    width_in: int
    width_out: int
    products: int  # multiply-adds a token
    plain: bool  # an `nn.Linear`, whose output can be kept


class _Expert(NamedTuple):
    products: int  # multiply-adds a token
    inner: int  # elements between gathering and giving back, a token
    active: int  # experts a token goes through


def model_work(model: BlockModel) -> ModelWork:
    """What the blocks of `model` do with a token."""
    hidden, vocab = model.hidden_size, model.vocab_size
    seen: dict[tuple[Any, ...], LayerWork] = {}  # layers look alike
    layers = []
    for number, layer in enumerate(model.structure.layers):
        key = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()), _window(model.config, number)
        if key not in seen:
            seen[key] = _layer_work(layer, model.config, number)
        layers.append(seen[key])
    return ModelWork(hidden, vocab, tuple(layers), hidden * vocab)


def _layer_work(layer: nn.Module, config: Any, number: int) -> LayerWork:
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    head_size = getattr(config, "v_head_dim", 0) or getattr(config, "head_dim", 0) or hidden // heads
    matrices, experts = list(_matrices(layer, config)), list(_experts(layer, config))
    into_residual = _into_residual(matrices, hidden)
    norms = [module for module in layer.modules() if _is_wide_norm(module, hidden)]
    inner = sum(expert.inner for expert in experts)
    gated = _inner_product(matrices, into_residual) if not experts else inner // 3
    last = matrices[-1] if matrices else None
    ends = not experts and len(norms) <= 2 and last is not None and last.plain and last in into_residual
    return LayerWork(
        products=sum(m.products for m in matrices) + sum(expert.products for expert in experts),
        tail=last.products if ends and last else 0,
        attention=heads * int(head_size),
        heads=heads,
        window=_window(config, number),
        outputs=sum(m.width_out for m in matrices if m.plain and not (ends and m is last)),
        graph=(2 + len(norms)) * hidden
        + sum(m.width_in if m in into_residual else 0 if _is_ramp(config, m) else m.width_out for m in matrices)
        + inner
        + (3 * experts[0].active * hidden if experts else 0),  # gathered, given back, weighted
        plain=gated + hidden * sum(not isinstance(norm, nn.LayerNorm) for norm in norms),
        norms=hidden * sum(not isinstance(norm, nn.LayerNorm) for norm in norms),
        widest=max([hidden, *(m.width_out for m in matrices), *(expert.inner for expert in experts)]),
        tiled=_tiled(layer, matrices, into_residual),
        materialises=config._attn_implementation == "eager",
    )


def _tiled(layer: nn.Module, matrices: list[_Matrix], into_residual: list[_Matrix]) -> int:
    mlp = find_mlp(layer)
    paths = {f"{path}." for path, module in layer.named_children() if module is mlp}
    inside = [m for m in matrices if m.path.startswith(tuple(paths))]
    return sum(m.width_in if m in into_residual else m.width_out for m in inside)


def _is_wide_norm(module: nn.Module, hidden: int) -> bool:
    weight = module._parameters.get("weight")
    return "norm" in type(module).__name__.lower() and weight is not None and weight.numel() == hidden


def _inner_product(matrices: list[_Matrix], into_residual: list[_Matrix]) -> int:
    """Elements of a gate's activation, kept beside its product with the other half; 0 where nothing is gated."""
    inner = into_residual[-1].width_in if into_residual else 0
    halves = sum(m.width_out // inner for m in matrices if inner and m.width_out in (inner, 2 * inner))
    return inner if halves == 2 else 0


def _is_ramp(config: Any, matrix: _Matrix) -> bool:
    """Whether the matrix's output goes through ReLU, whose gradient needs only what it gives."""
    activation = getattr(config, "activation_function", None) or getattr(config, "hidden_act", None)
    return activation == "relu" and matrix.width_out > matrix.width_in


def _matrices(layer: nn.Module, config: Any) -> Iterator[_Matrix]:
    """The weights that every token is multiplied with, and those of experts that are modules, by their share."""
    for path, module in layer.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
            continue
        transposed = type(module).__name__ == "Conv1D"
        width_out, width_in = reversed(weight.shape) if transposed else weight.shape
        active, total = _experts_per_token(config) if _EXPERT.search(f"{path}.") else (1, 1)
        products = weight.numel() * active // total
        yield _Matrix(path, width_in, max(width_out * active // total, 1), products, type(module) is nn.Linear)


def _experts(layer: nn.Module, config: Any) -> Iterator[_Expert]:
    """The weights that hold all experts, [experts, ., .], as far as a token meets them."""
    active, total = _experts_per_token(config)
    for parameter in layer.parameters():
        if parameter.dim() == 3:
            inner = sum(parameter.shape[1:]) - int(config.hidden_size)
            yield _Expert(parameter.numel() * active // total, inner * active, active)


def _experts_per_token(config: Any) -> tuple[int, int]:
    """Experts that a token goes through, and all of them."""

    def first(*names: str) -> int:
        return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), 1)

    total = first("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    active = first("num_experts_per_tok", "moe_top_k")
    return min(active, total), total


def _into_residual(matrices: list[_Matrix], hidden: int) -> list[_Matrix]:
    """Per part of a layer the matrix whose output is added to the hidden states, in the order of the parts."""
    last: dict[str, _Matrix] = {}
    for matrix in matrices:
        part, dot, _ = matrix.path.partition(".")
        if matrix.width_out == hidden:
            last[part if dot else ""] = matrix
    return list(last.values())


def _window(config: Any, number: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[number] != "sliding_attention":
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window and getattr(config, "use_sliding_window", True) else None
