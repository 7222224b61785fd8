"""What went wrong: where a loss or a gradient is not finite, and which of two errors the caller hears of."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from horizon.config.schema import Clip, OnNonFinite
from horizon.errors import NonFiniteError
from horizon.optim.clipping import Clipping
from horizon.runtime import Runtime
from horizon.stream.batch import MicroBatch
from horizon.zo.runtime import ZerothOrderRuntime

logger = logging.getLogger(__name__)


def explain_non_finite(runtime: Runtime | ZerothOrderRuntime, loss: float, batches: Sequence[MicroBatch]) -> str:
    """The first block whose output is not finite, by a forward pass that looks, or the parameter whose gradient is."""
    if isinstance(runtime, ZerothOrderRuntime):
        return runtime.explain_non_finite(loss, batches)
    if math.isfinite(loss):
        return f"the gradient of {_first_bad_gradient(runtime)} is not finite (loss {loss:.4g})"
    block = runtime.guarded(lambda: runtime.executor.first_non_finite(batches, runtime.version))
    if block is None:
        return f"the loss is {loss}, though every block's output is finite; look at loss_fn and labels"
    return f"the loss is {loss}; block {runtime.model.layouts[block].name!r} is the first whose output is not finite"


def _first_bad_gradient(runtime: Runtime) -> str:
    """The parameter nearest the loss whose gradient is not finite."""
    assert runtime.executor.gradients is not None
    norms = runtime.executor.gradients.norms.cpu()
    bad = [name for name, norm in zip(runtime.trainable_names(), norms, strict=True) if not norm.isfinite()]
    return bad[-1] if bad else "no single parameter"


def report_dropped(
    runtime: Runtime | ZerothOrderRuntime, step: int, loss: float, batches: Sequence[MicroBatch],
    on_nonfinite: OnNonFinite, clipping: Clipping,
) -> None:  # fmt: skip
    """Say why a step is not finite, and raise a NonFiniteError unless such steps are skipped."""
    message = f"step {step}: {explain_non_finite(runtime, loss, batches)}"
    if on_nonfinite is OnNonFinite.skip:
        logger.warning("%s; the step is skipped", message)
        return
    if runtime.version < step:
        remedy = "on_nonfinite=skip" + (" and clip=exact" if clipping.mode is Clip.lagged else "")
        raise NonFiniteError(f"{message}; set {remedy} to drop such steps (train.on_nonfinite)")
    error = NonFiniteError(
        f"{message}; blocks were updated before that was known: load the last saved model and set max_grad_norm "
        "with clip=exact, or on_nonfinite=skip (optim.max_grad_norm, optim.clip, train.on_nonfinite)"
    )
    runtime.fail(error)
    raise error


@contextmanager
def said_beside(error: BaseException | None) -> Iterator[None]:
    """What fails inside is raised, or only logged where `error` went wrong first: the caller hears of that."""
    try:
        yield
    except Exception:
        if error is None:
            raise
        logger.exception("closing the engine failed, too")
