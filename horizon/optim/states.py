"""The arrays of a block that an update takes, in one order: master, moments, gradient, scales of int8 moments."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from horizon.config.schema import MasterFormat, Moments
from horizon.optim.adamw import Array, UpdateArrays
from horizon.plan.states import MASTERS, MOMENTS, State

GRADS = State("grads", torch.bfloat16)  # or float32


def update_order(moments: Moments, master: MasterFormat = MasterFormat.split) -> tuple[State, ...]:
    """What an update with states of these formats takes: master, moments, gradient, scales."""
    first, second, *scales = MOMENTS[moments]
    return (*MASTERS[master], first, second, GRADS, *scales)


def traffic(arrays: Sequence[Array], order: Sequence[State]) -> int:
    """Bytes that an update of these arrays, in that order, moves: it reads all and writes all but the gradient."""
    grads = arrays[order.index(GRADS)]
    return 2 * sum(array.nbytes for array in arrays) - grads.nbytes


@dataclass(frozen=True, slots=True)
class UpdateStates:
    """The host arrays of one block, its trainable prefix each or more; kinds as in `horizon.optim.adamw`."""

    weights: Array
    residual: Array | None
    exp_avg: Array
    exp_avg_sq: Array
    grads: Array
    exp_avg_scale: Array | None = None
    exp_avg_sq_scale: Array | None = None

    @classmethod
    def of_tensors(
        cls,
        weights: Tensor,
        residual: Tensor | None = None,
        *,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grads: Tensor,
        exp_avg_scale: Tensor | None = None,
        exp_avg_sq_scale: Tensor | None = None,
    ) -> UpdateStates:
        """Views of flat CPU tensors of the kinds that `horizon.plan.states` lists; `grads`: bfloat16 or float32."""
        given = (weights, residual, exp_avg, exp_avg_sq, grads, exp_avg_scale, exp_avg_sq_scale)
        return cls(*(None if tensor is None else as_array(tensor) for tensor in given))  # type: ignore[arg-type]

    def arrays(self) -> UpdateArrays:
        """The arrays that there are, in the order that an update takes them."""
        return tuple(array for name in self.__slots__ if (array := getattr(self, name)) is not None)

    def check(self, num_trainable: int, order: Sequence[State], elsewhere: Collection[str] = ()) -> None:
        """Raise a RuntimeError if an array is too short, not flat or of a wrong kind: the kernel does not look.

        Args:
            order: what the update takes.
            elsewhere: states that have empty arrays here.
        """
        for array, state in zip(self.arrays(), order, strict=True):
            kinds = ("uint16", "float32") if state is GRADS else (_array_kind(state),)
            flat = array.ndim == 1 and array.flags.c_contiguous
            least = 0 if state.name in elsewhere else state.span(0, num_trainable).stop
            if not flat or array.dtype.name not in kinds or array.size < least:
                raise RuntimeError(
                    f"state {state.name} is {array.dtype} {list(array.shape)} ({'flat' if flat else 'not flat'}); "
                    f"expected a flat {' or '.join(kinds)} array of at least {least} elements"
                )


def as_array(tensor: Tensor) -> Array:
    """A numpy view; 16-bit kinds as uint16 bits."""
    return tensor.view(torch.uint16).numpy() if tensor.itemsize == 2 else tensor.numpy()


def _array_kind(state: State) -> str:
    return str(as_array(torch.empty(0, dtype=state.dtype)).dtype)
