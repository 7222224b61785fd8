"""A model whose own forward runs with its blocks streamed, so that transformers' `generate` can drive it.

    transformers    generate: masks, positions, the cache, what follows from the logits
    the model       its own forward, embedding and head included
    here            a stand-in for every layer, which has its block brought to the device, runs it, and lets it go

Nothing of the model's code is repeated. Parameters are bound where and while that code reads them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from horizon.models.blocks import BlockModel
from horizon.models.structure import Call, LastLayerReached, Tap
from horizon.stream.forward import Visits


class _Walk:
    """One forward pass: which block is bound."""

    def __init__(self, model: BlockModel, visits: Visits):
        self._model, self._visits, self._bound = model, visits, ExitStack()
        self._next = next(visits)

    def bind(self, block: int) -> None:
        """Have the embedding or the head compute with its parameters, until the next block is asked for."""
        self._bound.enter_context(self._model.bound(block, self._next[1]))

    def layer(self, block: int, hidden: Tensor, call: Call) -> Tensor:
        """Run a layer, if it is the next block."""
        self.release()
        if self._next[0] == 0:
            self._next = next(self._visits)
        if self._next[0] != block:
            return hidden
        hidden = self._model.layer(block, self._next[1], hidden, call)
        following = next(self._visits, None)
        if following is None:
            raise LastLayerReached  # of those that were asked for
        self._next = following
        if following[0] == self._model.head:
            self.bind(self._model.head)
        return hidden

    def end(self) -> None:
        """The pass is over: let go of the head."""
        self.release()
        next(self._visits, None)

    def release(self) -> None:
        """Unbind what is bound, wherever the pass ended. Idempotent."""
        self._bound.close()


class _Layer(Tap):
    """Stands where a decoder layer was."""

    def __init__(self, layer: Any, block: int, run: Callable[[int, Tensor, Call], Tensor], returns_tuple: bool):
        super().__init__(layer, [], returns_tuple)
        self._block, self._run = block, run

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = self._run(self._block, hidden_states, Call(args, kwargs))
        return (hidden,) if self._returns_tuple else hidden


class StreamedModel:
    """A block model as transformers' `generate` wants it; `open` gives it.

    Args:
        visit: begins a walk over all blocks, or some.
    """

    def __init__(self, model: BlockModel, visit: Callable[[Sequence[int] | None], Visits], device: torch.device):
        self._model, self._visit, self._device = model, visit, device
        self._walk: _Walk | None = None

    @contextmanager
    def open(self, blocks: Sequence[int] | None = None) -> Iterator[PreTrainedModel]:
        """The model, dropout off. With `blocks`, other layers hand their input on, and the last one ends the pass.

        Raises (out of the model's forward):
            LastLayerReached: the last of `blocks` was run.
        """
        structure = self._model.structure
        self._model.train(False)
        visits = self._visit(blocks)

        def run(block: int, hidden: Tensor, call: Call) -> Tensor:
            assert self._walk is not None
            return self._walk.layer(block, hidden, call)

        stand_ins = [_Layer(layer, i + 1, run, structure.returns_tuple) for i, layer in enumerate(structure.layers)]

        def forward(streamed: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal visits
            self._walk = _Walk(self._model, visits)
            self._walk.bind(0)
            output = original(streamed, *args, **kwargs)
            self._walk.end()
            visits = self._visit(blocks)  # the next pass's first blocks load while its token is chosen
            return output

        skeleton = self._model.skeleton
        original = type(skeleton).forward
        with structure.replaced(stand_ins):
            try:
                yield _as_on(skeleton, self._device, functools.wraps(original)(forward))
            finally:
                if self._walk is not None:
                    self._walk.release()
                    self._walk = None  # it holds the slots


def _as_on(skeleton: Any, device: torch.device, forward: Callable[..., Any]) -> Any:
    """The skeleton with another forward, and on `device` for whoever asks: its own parameters are nowhere."""
    kind = type(skeleton)
    streamed = copy.copy(skeleton)
    streamed.__class__ = type(kind.__name__, (kind,), {"forward": forward, "device": property(lambda _: device)})
    return streamed
