"""The rows and summaries that a run emits: the field names are those of `metrics.jsonl` and `summary.json`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did."""

    loss: float  # mean over trained tokens (or the custom loss)
    grad_norm: float  # global L2 norm before clipping
    num_tokens: int  # trained tokens
    seconds: float
    skipped: bool = False  # not finite, and on_nonfinite is "skip": nothing was updated
    clip_scale: float = 1.0  # what the gradients were multiplied by; below 1: clipped
    corrected_blocks: int = 0  # clip=speculative: updated as if nothing were clipped, and then again


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One optimizer step, one line of `metrics.jsonl`. NaN and infinities are written as null."""

    step: int  # from 1
    epoch: int  # from 0: how often the data had been gone through when the step's rows were drawn
    loss: float  # mean over the step's trained tokens, before the update
    lr: float
    grad_norm: float  # of all gradients, before clipping
    num_tokens: int  # that went through the model; padding never counts
    num_trained_tokens: int  # of these, what the loss is the mean of
    seconds: float  # wall time, fetching the rows included
    tokens_per_s: float  # num_tokens / seconds
    host_bytes: int  # measured after the step
    device_bytes: int
    skipped: bool  # the gradients were not finite and the weights stayed (train.on_nonfinite=skip)
    time: float  # when the step ended, seconds since 1970


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a finished run has to say; `summary.json`."""

    steps: int
    num_tokens: int  # of all steps, without padding
    seconds: float  # in steps, without evaluation and saving
    tokens_per_s: float
    loss: float  # of the last step
    validation_loss_before: float | None  # None: no rows were held out, or train.eval_rows=0
    validation_loss_after: float | None
    sample_before: str | None  # None: train.sample_tokens=0
    sample_after: str | None
    output_dir: str
    model_dir: str | None  # None: train.save=false
