"""How a Hugging Face causal LM is built around its decoder layers, found by running it, not by knowing it.

One forward pass over two tokens with weights that are a single expanded zero shows where the layer list
sits, what the model calls before the first layer and after the last one, and what a layer returns. Nothing
of the model's own code is repeated here: the embedding side later runs the model's forward up to its last
layer, the head side runs the model's forward with the layers' owner already finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from horizon.errors import UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Call:
    """What the model hands one layer besides the hidden states: masks, rotary tables, position ids."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Structure:
    """Where the parts of one model are."""

    owner: nn.Module  # the module whose forward walks the layers
    owner_path: str
    list_name: str  # attribute of `owner` that holds them
    layers: tuple[nn.Module, ...]
    returns_tuple: bool  # layers return (hidden states, ...)
    tail: tuple[nn.Module, ...]  # what the owner applies after the last layer, one after the other
    output_type: type  # what the owner returns
    early: frozenset[str]  # parameters the model has used when the first layer runs

    @property
    def layers_path(self) -> str:
        return f"{self.owner_path}.{self.list_name}" if self.owner_path else self.list_name

    def replaced(self, layers: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """While open, the model walks these modules instead of its layers."""
        return _replaced(self.owner, self.list_name, nn.ModuleList(layers))


class LastLayerReached(Exception):
    """Leaves a model's forward once every layer has been called; carries the hidden states of the first."""


class Tap(nn.Module):
    """Stands where a decoder layer was: records how it is called and passes the hidden states on.

    The last tap may stop the forward pass: what follows the layers belongs to another block.
    """

    def __init__(self, layer: nn.Module, log: list[tuple[Tensor, Call]], returns_tuple: bool, stop: bool = False):
        super().__init__()
        self.__dict__["_layer"] = layer  # not a child: the tap must not own the layer's parameters
        self._log, self._returns_tuple, self._stop = log, returns_tuple, stop

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"], name)  # model code may ask a layer for its attention type

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._log.append((hidden_states, Call(args, kwargs)))
        if self._stop:
            raise LastLayerReached
        return (hidden_states,) if self._returns_tuple else hidden_states


@contextmanager
def tapped(structure: Structure, log: list[tuple[Tensor, Call]]) -> Iterator[None]:
    """While open, the model's layers are taps that record into `log`, the last one stopping the forward."""
    last = len(structure.layers) - 1
    taps = [Tap(layer, log, structure.returns_tuple, stop=i == last) for i, layer in enumerate(structure.layers)]
    with structure.replaced(taps):
        yield


@contextmanager
def _replaced(module: nn.Module, name: str, value: nn.Module) -> Iterator[None]:
    original = module._modules[name]
    module._modules[name] = value
    try:
        yield
    finally:
        module._modules[name] = original


def find_structure(model: nn.Module) -> Structure:
    """Learn a skeleton's structure (see the module's docstring); the model is left as it was.

    Raises:
        UnsupportedModelError: no single list of decoder layers, or the model does not treat it as a chain.
    """
    owner_path, list_name = _find_layer_list(model)
    owner = model.get_submodule(owner_path)
    layers = tuple(owner.get_submodule(list_name).children())
    failure: Exception | None = None
    for returns_tuple in (False, True):
        trace = _Trace(model, owner, list_name, layers, returns_tuple)
        if trace.run():
            return Structure(
                owner, owner_path, list_name, layers, returns_tuple, trace.tail(), trace.output_type, trace.early()
            )
        failure = trace.failure or failure
    why = f" (its forward fails with {failure!r})" if failure else ""
    raise UnsupportedModelError(
        f"{type(model).__name__}: its {len(layers)} layers in {owner_path}.{list_name} are not a chain in which each "
        f"one takes the hidden states of the one before{why}; Horizon streams plain decoder stacks only"
    ) from failure


def _find_layer_list(model: nn.Module) -> tuple[str, str]:
    depth = getattr(model.config, "num_hidden_layers", None)
    lists = [
        (sum(p.numel() for p in module.parameters()), name)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and any(True for _ in module.parameters())
    ]
    if not lists:
        raise UnsupportedModelError(
            f"{type(model).__name__}: found no list of {depth} decoder layers (config.num_hidden_layers); "
            "Horizon streams decoder-only models whose layers stand in one ModuleList"
        )
    path = max(lists)[1]
    owner_path, _, list_name = path.rpartition(".")
    return owner_path, list_name


class _OwnerDone(Exception):
    pass


class _Trace:
    """One run of the model's forward, up to its owner's return, with taps for layers and zeros for weights."""

    def __init__(
        self, model: nn.Module, owner: nn.Module, list_name: str, layers: tuple[nn.Module, ...], returns_tuple: bool
    ):
        self.model, self.owner, self.list_name = model, owner, list_name
        self.layers, self.returns_tuple = layers, returns_tuple
        self.log: list[tuple[Tensor, Call]] = []
        self.called: list[tuple[nn.Module, int]] = []  # module, number of layers called before it
        self.after: list[tuple[nn.Module, Tensor, Tensor]] = []  # owner's children called after the last layer
        self.output: Any = None
        self.failure: Exception | None = None

    def run(self) -> bool:
        """True where the layers form a chain under this guess of what a layer returns."""
        taps = nn.ModuleList(Tap(layer, self.log, self.returns_tuple) for layer in self.layers)
        with _replaced(self.owner, self.list_name, taps):
            handles = [m.register_forward_pre_hook(self._on_call) for m in self.model.modules()]
            handles += [m.register_forward_hook(self._on_child) for m in self.owner.children() if m is not taps]
            handles.append(self.owner.register_forward_hook(self._on_owner))
            zeros = {name: torch.zeros(()).expand(p.shape) for name, p in self.model.named_parameters()}
            tokens = torch.zeros(1, 2, dtype=torch.long)
            try:
                with torch.no_grad():
                    torch.func.functional_call(self.model, zeros, (), {"input_ids": tokens, "use_cache": False})
            except _OwnerDone:
                pass
            except (IndexError, ValueError, RuntimeError, AttributeError, TypeError) as error:
                if not self.log:
                    raise UnsupportedModelError(
                        f"{type(self.model).__name__}: its forward fails before the first layer: {error}"
                    ) from error
                self.failure = error
                return False  # the model stumbles over the kind of value the taps return
            finally:
                for handle in handles:
                    handle.remove()
        return self._is_chain()

    def _on_call(self, module: nn.Module, args: Any) -> None:
        self.called.append((module, len(self.log)))

    def _on_child(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(self.log) == len(self.layers) and args and isinstance(output, Tensor):
            self.after.append((module, args[0], output))

    def _on_owner(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = output
        raise _OwnerDone

    def _is_chain(self) -> bool:
        hidden = self.log[0][0] if self.log else None
        return (
            hidden is not None
            and hidden.dim() == 3
            and len(self.log) == len(self.layers)
            and all(_same(h, hidden) for h, _ in self.log)
            and self._tail_is_chain()
        )

    def _tail_is_chain(self) -> bool:
        current = self.log[-1][0]
        for _, given, produced in self.after:
            if not _same(given, current):
                return False
            current = produced
        final = self.output[0] if not hasattr(self.output, "last_hidden_state") else self.output.last_hidden_state
        return _same(final, current)

    def tail(self) -> tuple[nn.Module, ...]:
        return tuple(module for module, _, _ in self.after)

    @property
    def output_type(self) -> type:
        return type(self.output)

    def early(self) -> frozenset[str]:
        names = {id(p): n for n, p in self.model.named_parameters()}
        modules = [module for module, num_layers_before in self.called if num_layers_before == 0]
        return frozenset(names[id(p)] for m in modules for p in m.parameters(recurse=False) if id(p) in names)


def _same(a: Any, b: Tensor) -> bool:
    """The same memory: model code may have viewed it in between."""
    return isinstance(a, Tensor) and a.data_ptr() == b.data_ptr() and a.shape == b.shape
