"""What a plan needs to know of a model: numbers of its blocks, and nothing of its code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from horizon.layout import BlockLayout, ParamSpec
from horizon.models.work import ModelWork, model_work

if TYPE_CHECKING:
    from horizon.models.blocks import BlockModel


@dataclass(frozen=True, slots=True)
class ModelShape:
    """One model; plain data, which can be written down and read again."""

    architecture: str  # its class
    layouts: tuple[BlockLayout, ...]
    work: ModelWork
    max_positions: int | None  # that it has an embedding for; None where any position can be computed
    buffer_bytes: int  # rotary tables and the like

    @property
    def hidden_size(self) -> int:
        """Elements of a token's hidden state."""
        return self.work.hidden_size

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return self.work.vocab_size

    @property
    def num_parameters(self) -> int:
        """Each once, whoever shares it."""
        return sum(spec.numel for spec in self._specs())

    @property
    def num_trainable(self) -> int:
        """Of these, those that are trained."""
        return sum(spec.numel for spec in self._specs() if spec.trainable)

    def _specs(self) -> Iterator[ParamSpec]:
        return (param.spec for layout in self.layouts for param in layout.params)


def shape_of(model: BlockModel) -> ModelShape:
    """The shape of a model that was taken apart."""
    skeleton = model.skeleton
    buffer_bytes = sum(buffer.nbytes for buffer in skeleton.buffers())
    return ModelShape(type(skeleton).__name__, model.layouts, model_work(model), model.max_positions, buffer_bytes)
