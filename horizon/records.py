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
    projected_gradients: tuple[float, ...] = ()  # zeroth order: (L+ - L-) / (2 eps) of each query; grad_norm is NaN


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
    clip_scale: float  # what the gradients were multiplied by; below 1: clipped
    corrected_blocks: int  # updated before the norm was known, and again because it clipped (optim.clip=speculative)
    resident_share: float  # the step's predicted arithmetic / seconds; null: the plan predicted nothing
    projected_gradients: list[float]  # optim=mezo: (L+ - L-) / (2 eps) of each query; grad_norm is then null
    simulated: bool  # the cxl tier was a stand-in (memory.cxl_simulated.size): no time here is that of a real one
    time: float  # when the step ended, seconds since 1970


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How well labels are predicted."""

    loss: float  # mean cross-entropy
    perplexity: float  # exp(loss)
    accuracy: float  # share of the labels that are the likeliest token
    num_tokens: int  # labels
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRow:
    """Held-out rows, scored once: one line of `evaluations.jsonl`."""

    step: int  # optimizer steps that the weights have seen; 0: before training
    loss: float  # mean cross-entropy of all labels
    perplexity: float  # exp(loss)
    accuracy: float  # share of the labels that are the likeliest token
    num_tokens: int  # labels
    num_rows: int
    sources: dict[str, Score]  # the same of each source's rows; empty where all rows are of one
    seconds: float
    time: float  # when it was done, seconds since 1970


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRow:
    """One checkpoint, one line of `checkpoints.jsonl`."""

    step: int  # optimizer steps that its weights have seen
    folder: str
    num_bytes: int  # of all arrays
    seconds: float  # from when it was asked for until all of it was on disk
    bytes_per_s: float  # num_bytes / seconds
    stall_s: float  # training waited: for the save to begin, and for blocks to be set aside before their update
    room_s: float  # of stall_s: the staging was full because the disk did not keep up
    time: float  # when it was on disk, seconds since 1970


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What crossed the link in a step, in one direction, or what was read from or written to disk."""

    direction: str  # H2D, D2H, or disk
    what: str  # weights, gradient, boundary; of the disk: read, write
    num_bytes: int
    least_bytes: int  # what a step needs with all states where they are
    busy_ms: float  # of the copies


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSplit:
    """Where a step's time went; means over the recorded steps. The six parts add up to `step_ms`."""

    steps: int  # recorded
    step_ms: float
    arithmetic_ms: float  # kernels of blocks
    link_ms: float  # compute waited for a copy,
    optimizer_ms: float  # for an update,
    disk_ms: float  # for states on nvme,
    data_ms: float  # for the caller's rows,
    launch_ms: float  # for the host to issue something
    hbm_update_ms: float  # of optimizer_ms: compute itself updated blocks that live in HBM
    forward_ms: float  # of arithmetic_ms, as are the next three
    head_ms: float
    backward_ms: float
    host_paced_ms: float  # visits at whose end the device had nothing queued: shorter than their launches
    traffic: list[Traffic]
    update_bytes: int  # of host memory that the update reads and writes
    update_ms: float  # the update's threads at work: how long it takes if nothing else is in its way
    update_threads: int
    update_bytes_per_s: float  # update_bytes / update_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What a finished run has to say; `summary.json`."""

    steps: int  # done, before a checkpoint that the run went on from, too
    num_tokens: int  # of all steps that metrics.jsonl lists, without padding; so are the next ones
    seconds: float  # in steps, without evaluation and saving
    tokens_per_s: float
    loss: float  # of the last step
    clip: str  # how gradients were clipped: none, exact, speculative, or "lagged clipping: not exact"
    clipped_steps: int
    corrected_blocks: int  # of all steps
    simulated: bool  # the cxl tier was a stand-in
    validation_loss_before: float | None  # None: no rows were held out, or eval.rows=0
    validation_loss_after: float | None
    stopped_early: str | None  # why, where eval.patience ended the run before train.steps
    sample_before: str | None  # None: train.sample_tokens=0
    sample_after: str | None
    split: StepSplit | None  # None: the run had been finished before, and had no step left
    output_dir: str
    model_dir: str | None  # None: train.save=false
    checkpoint: str | None  # saved last; None: checkpoint.save_every=null
    resumed_from: str | None  # the checkpoint; None: the run began anew
    trace_file: str | None  # None: trace=false
