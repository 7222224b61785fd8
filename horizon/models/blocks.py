"""A Hugging Face decoder-only model as blocks: embedding, one block per decoder layer, final norm + head.

`BlockModel` holds no weights. Each method runs the model's own modules on parameters handed to it (views of a
slot), so one block at a time needs memory. Every layer keeps its own module, hence its own attributes and
buffers. Shape legend: B rows, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from horizon.errors import ConfigError, UnsupportedModelError
from horizon.layout import BlockLayout, Param, ParamSpec, place_block
from horizon.models.attention import adopt, masks_from
from horizon.models.documents import Documents, find_documents
from horizon.models.kernels import FusedKernels
from horizon.models.linear import GradientSums, Kept, Linears, find_tail
from horizon.models.structure import Call, LastLayerReached, Structure, find_structure, tapped
from horizon.models.tiles import TiledMlp, find_mlp, takes_tiles

Params = Mapping[str, Tensor]  # local parameter name -> tensor


class BlockModel:
    """The blocks of one skeleton: their layouts, and how to run each.

    Block 0 is the embedding, blocks 1..L the decoder layers, block L+1 the final norm and the head. Nothing of a model
    that is not `trains` is trained.
    """

    def __init__(self, skeleton: Any, freeze: Sequence[str] = (), fused: bool = False, trains: bool = True):
        self.skeleton = skeleton
        self.config: Any = skeleton.config
        skeleton.train(True)
        if getattr(skeleton.config, "layerdrop", 0):
            raise UnsupportedModelError(
                f"config.layerdrop={skeleton.config.layerdrop}: dropping whole layers is not supported; set 0"
            )
        if trains:
            _freeze(skeleton, freeze)
        else:
            skeleton.requires_grad_(False)
        self.structure: Structure = find_structure(skeleton)
        adopt(skeleton)
        self.layouts: tuple[BlockLayout, ...] = _lay_out(skeleton, self.structure)
        self.parameter_names: tuple[str, ...] = tuple(name for name, _ in skeleton.named_parameters())
        # by block and training or not (dropout saves its mask): the projection that recomputation leaves out
        self._tails: dict[tuple[int, bool], nn.Linear | None] = {}
        self._accepts = frozenset(inspect.signature(skeleton.forward).parameters)
        self.fused = fused  # fused kernels where there are some
        self._kernels = FusedKernels(skeleton) if fused else None
        modules = (skeleton, *self.structure.layers, skeleton)
        self._bindings = tuple(_Binding(m, lay) for m, lay in zip(modules, self.layouts, strict=True))
        self._linears = tuple(
            Linears(m, {name for name, _, _ in lay.slot_ranges()}) for m, lay in zip(modules, self.layouts, strict=True)
        )
        mlps = [find_mlp(layer) for layer in self.structure.layers]
        self._mlps = tuple(TiledMlp(m, lin) if m else None for m, lin in zip(mlps, self._linears[1:], strict=False))

    @property
    def num_blocks(self) -> int:
        return len(self.layouts)

    @property
    def head(self) -> int:
        """Index of the head block."""
        return self.num_blocks - 1

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @cached_property
    def max_positions(self) -> int | None:
        """Positions that the model has an embedding for; None where any position can be computed."""
        limit = getattr(self.config, "max_position_embeddings", None)
        tokens = self.skeleton.get_input_embeddings()
        tables = [m for m in self.skeleton.modules() if isinstance(m, nn.Embedding) and m is not tokens]
        # OPT's table has two rows more than it has positions.
        return limit if limit and any(0 <= table.num_embeddings - limit <= 2 for table in tables) else None

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.skeleton.parameters())

    def uses_dropout(self) -> bool:
        """Whether a training forward draws random numbers: masks must then be replayed by a recomputation."""
        in_modules = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.skeleton.modules())
        in_config = any(
            ("drop" in key or "jitter" in key) and isinstance(value, float) and value > 0
            for key, value in self.config.to_dict().items()
        )
        return in_modules or in_config

    def train(self, mode: bool) -> None:
        """Switch dropout on or off, as `nn.Module.train`."""
        if self.skeleton.training is not mode:
            self.skeleton.train(mode)

    def to(self, device: torch.device) -> None:
        """Move the buffers (rotary tables and the like, never parameters) to `device`."""
        for module in self.skeleton.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)

    def check_inputs(self, names: Sequence[str]) -> None:
        """Raise ConfigError when the model's forward does not take one of the named inputs."""
        for name in names:
            if name not in self._accepts:
                raise ConfigError(
                    f"{type(self.skeleton).__name__} does not take {name!r}: a packed batch needs position_ids "
                    "(set data.packing=false), a padded one attention_mask"
                )

    def bound(self, block: int, params: Params) -> AbstractContextManager[None]:
        """While open, the skeleton's modules compute with these parameters of a block; else they have no storage."""
        return self._bindings[block].bound(params)

    def embed(
        self,
        params: Params,
        inputs: Mapping[str, Tensor],
        documents: Documents | None = None,
        sums: GradientSums | None = None,
    ) -> tuple[Tensor, list[Call]]:
        """Run the model up to its first layer.

        Args:
            params: the embedding block's parameters.
            inputs: input_ids [B, T] and, where given, attention_mask [B, T] and position_ids [B, T].
            documents: how these divide; None: found here, which waits for inputs that are on a GPU.
            sums: where a backward through the hidden states puts the gradients of embedding tables.

        Returns:
            hidden states [B, T, H], and for every layer what the model calls it with.
        """
        log: list[tuple[Tensor, Call]] = []
        documents = documents or find_documents(inputs, inputs["input_ids"].device)
        masks = masks_from(documents, inputs, self.config._attn_implementation)
        running, differentiating = tapped(self.structure, log), self._differentiating(0, sums)
        with self._bindings[0].bound(params), differentiating, masks, running, suppress(LastLayerReached):
            self.skeleton(**inputs, use_cache=False)
        return log[0][0], [call for _, call in log]

    def layer(
        self, block: int, params: Params, hidden: Tensor, call: Call, outputs: list[Tensor | None] | None = None
    ) -> Tensor:
        """Run decoder layer `block` (1..L): hidden states [B, T, H] in, hidden states out.

        `outputs`, where given, receives what `recompute` can take as `kept`.
        """
        tiled = self._tiled(block, hidden)
        context: AbstractContextManager[None] = nullcontext()
        if outputs is not None:
            context = self._linears[block].keeping(outputs, self._tails.get((block, self.skeleton.training)))
        elif tiled is not None:
            context = tiled.forward_only()
        with context:
            return self._run_layer(block, params, hidden, call)

    def differentiable_layer(
        self, block: int, params: Params, hidden: Tensor, call: Call, sums: GradientSums
    ) -> Tensor:
        """As `layer`, for a backward that puts the gradients of linear weights into `sums`."""
        with self._linears[block].differentiating(sums):
            return self._run_layer(block, params, hidden, call)

    def recompute(
        self, block: int, params: Params, hidden: Tensor, call: Call, sums: GradientSums, kept: Kept = ()
    ) -> Tensor:
        """Run decoder layer `block` again for its backward: an output to differentiate, whose values may be missing.

        The gradients of linear weights go to `sums`, those of all other parameters where autograd puts them.
        """
        linears, key = self._linears[block], (block, self.skeleton.training)
        if key not in self._tails:
            layer = self.structure.layers[block - 1]
            with linears.differentiating(sums, kept):
                output, self._tails[key] = find_tail(layer, lambda: self._run_layer(block, params, hidden, call))
            return output
        tiled, tail = self._tiled(block, hidden), self._tails[key]
        tiling = nullcontext() if tiled is None or kept else tiled.differentiating(sums, tail)
        with linears.differentiating(sums, kept, tail), tiling:
            return self._run_layer(block, params, hidden, call)

    def _run_layer(self, block: int, params: Params, hidden: Tensor, call: Call) -> Tensor:
        with self._bindings[block].bound(params), self._kernels.active() if self._kernels else nullcontext():
            output = self.structure.layers[block - 1](hidden, *call.args, **call.kwargs)
        return output[0] if self.structure.returns_tuple else output  # type: ignore[no-any-return]

    def _tiled(self, block: int, hidden: Tensor) -> TiledMlp | None:
        """The layer's MLP, where it has one and the tokens are more than a tile."""
        return self._mlps[block - 1] if takes_tiles(hidden) else None

    def _differentiating(self, block: int, sums: GradientSums | None) -> AbstractContextManager[None]:
        return nullcontext() if sums is None else self._linears[block].differentiating(sums)

    def logits(self, params: Params, hidden: Tensor, sums: GradientSums | None = None) -> Tensor:
        """Final norm, head and whatever the model does to its logits: [B, T, H] -> [B, T, V].

        With `sums`, a backward puts the gradients of linear weights there.
        """

        def finished(*args: Any, **kwargs: Any) -> Any:
            state = hidden
            for module in self.structure.tail:
                state = module(state)
            return self.structure.output_type(last_hidden_state=state)

        owner = self.structure.owner
        with self._bindings[self.head].bound(params), self._differentiating(self.head, sums):
            owner.__dict__["forward"] = finished  # the layers' owner has already run, block by block
            try:
                return self.skeleton(inputs_embeds=hidden, use_cache=False).logits  # type: ignore[no-any-return]
            finally:
                del owner.__dict__["forward"]


class _Binding:
    """The places in a module tree where one block's parameters are read from."""

    def __init__(self, module: nn.Module, layout: BlockLayout):
        self._places: list[tuple[str, dict[str, Any], str]] = []
        for local_name, _, _ in layout.slot_ranges():
            path, _, leaf = local_name.rpartition(".")
            self._places.append((local_name, module.get_submodule(path)._parameters, leaf))

    @contextmanager
    def bound(self, params: Params) -> Iterator[None]:
        """While open, the module computes with `params`; afterwards it is storage-free again."""
        originals = [(table, leaf, table[leaf]) for _, table, leaf in self._places]
        try:
            for name, table, leaf in self._places:
                table[leaf] = params[name]
            yield
        finally:
            for table, leaf, original in originals:
                table[leaf] = original


def _freeze(skeleton: nn.Module, patterns: Sequence[str]) -> None:
    names = [name for name, _ in skeleton.named_parameters()]
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise ConfigError(f"model.freeze={pattern!r} matches no parameter; names look like {names[0]!r}")
        for name in matched:
            skeleton.get_parameter(name).requires_grad_(False)
    if not any(p.requires_grad for p in skeleton.parameters()):
        if patterns:
            raise ConfigError("model.freeze leaves no parameter to train")
        raise ConfigError("no parameter of the model requires a gradient; load adapters with is_trainable=True")


def _lay_out(skeleton: nn.Module, structure: Structure) -> tuple[BlockLayout, ...]:
    specs = _specs(skeleton)
    aliases = dict(skeleton.named_parameters(remove_duplicate=False))
    prefix = structure.layers_path + "."
    in_layers = {name for name in specs if name.startswith(prefix)}
    early = [specs[n] for n in specs if n in structure.early and n not in in_layers]
    late = [specs[n] for n in specs if n not in structure.early and n not in in_layers]
    layouts = [place_block(0, "embed", early)]
    for i in range(len(structure.layers)):
        own = prefix + f"{i}."
        layer = [_local(spec, own) for name, spec in specs.items() if name.startswith(own)]
        layouts.append(place_block(i + 1, f"layers.{i}", layer))
    shared = _shared_with_head(skeleton, structure, aliases, {s.name for s in late}, layouts[0])
    layouts.append(place_block(len(layouts), "head", late, shared))
    _check_complete(specs, aliases, layouts)
    return tuple(layouts)


def _specs(skeleton: nn.Module) -> dict[str, ParamSpec]:
    return {
        name: ParamSpec(name, name, tuple(p.shape), p.requires_grad, _decays(skeleton, name, p))
        for name, p in skeleton.named_parameters()
    }


def _decays(skeleton: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: not for norms, biases, and other vectors."""
    path, _, leaf = name.rpartition(".")
    is_norm = "norm" in type(skeleton.get_submodule(path)).__name__.lower()
    return not is_norm and "bias" not in leaf and parameter.dim() > 1


def _local(spec: ParamSpec, prefix: str) -> ParamSpec:
    return ParamSpec(spec.name, spec.name.removeprefix(prefix), spec.shape, spec.trainable, spec.decay)


def _shared_with_head(
    skeleton: nn.Module,
    structure: Structure,
    aliases: Mapping[str, nn.Parameter],
    late: set[str],
    embed: BlockLayout,
) -> list[tuple[str, int, Param]]:
    """Parameters of the embedding block that the head side reads under another name (tied embeddings)."""
    owned = {id(skeleton.get_parameter(p.name)): p for p in embed.params}
    return [
        (alias, 0, owned[id(parameter)])
        for alias, parameter in aliases.items()
        if id(parameter) in owned and alias != owned[id(parameter)].name and alias not in late
    ]


def _check_complete(
    specs: Mapping[str, ParamSpec], aliases: Mapping[str, nn.Parameter], layouts: Sequence[BlockLayout]
) -> None:
    placed = [p.name for layout in layouts for p in layout.params]
    covered = len(placed) + sum(len(layout.borrowed) for layout in layouts)
    if sorted(placed) != sorted(specs) or covered != len(aliases):
        shared = sorted(set(aliases) - set(placed))
        raise UnsupportedModelError(
            f"parameters are shared in a way blocks cannot express: {', '.join(shared[:4])}; "
            "only an embedding shared with the head can be streamed"
        )


def block_parameters(layout: BlockLayout, flat: Tensor) -> dict[str, Tensor]:
    """The block's parameters as views of a slot's flat buffer: local name -> view."""
    return {name: flat[offset : offset + _numel(shape)].view(shape) for name, offset, shape in layout.slot_ranges()}


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
