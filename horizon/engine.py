"""The engine: one model in host memory, trained through the device a block at a time.

Composes adapter, plan, store, executor and optimizer; everything a training script needs and nothing of data,
schedules or reports.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from horizon.checkpoint.hf_export import Tokenizer, export_model
from horizon.config.schema import ComputeDtype, Kernels, MemoryConfig, OnNonFinite
from horizon.errors import BatchError, ConfigError, HorizonError, NonFiniteError
from horizon.models.skeleton import build_skeleton, resolve_model, skeleton_from_instance
from horizon.optim.adamw import AdamW
from horizon.optim.clipping import check_max_grad_norm, clip_scale, global_norm
from horizon.plan.machine import process_bytes
from horizon.plan.memory import MemoryPlan
from horizon.runtime import Runtime, build_runtime
from horizon.stream.batch import Batch, MicroBatch, to_micro_batches
from horizon.stream.head import LossFn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did."""

    loss: float  # mean over trained tokens (or the custom loss)
    grad_norm: float  # global L2 norm before clipping
    num_tokens: int  # trained tokens
    seconds: float
    skipped: bool = False  # not finite, and on_nonfinite is "skip": nothing was updated


class Engine:
    """Trains one causal LM whose parameters and optimizer state live in host memory.

    Build one with `from_pretrained` or `from_config`. It is a context manager; `close` releases all memory.
    Not for use from several threads.

    Attributes:
        lr: learning rate of the next step; set it to follow a schedule.
        plan: predicted bytes per tier.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        lr: float,
        max_grad_norm: float | None,
        seed: int,
        on_nonfinite: OnNonFinite,
    ):
        self._runtime = runtime
        self.lr = lr
        self._max_grad_norm, self._seed, self._on_nonfinite = max_grad_norm, seed, on_nonfinite
        self._version = 0  # optimizer steps so far
        self._passes = 0  # backward passes so far: each draws its own dropout masks
        self._accumulated = 0  # tokens whose gradients wait for `optimizer_step`
        self._loss = 0.0  # their mean loss
        self._has_gradients = False
        self._batches: list[MicroBatch] = []
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        *,
        optimizer: AdamW | None = None,
        memory: MemoryConfig | None = None,
        max_grad_norm: float | None = 1.0,
        device: str = "auto",
        compute_dtype: str = "auto",
        kernels: str = "auto",
        seed: int = 0,
        freeze: Sequence[str] = (),
        on_nonfinite: str = "stop",
        revision: str | None = None,
        trust_remote_code: bool = False,
        self_check: bool = True,
    ) -> Engine:
        """An engine for a Hugging Face causal LM.

        Args:
            model: a folder (with only a config.json: random weights), a hub id, a transformers config as a dict, or a
                live transformers model, whose weights are copied and which is left as it is.
            optimizer: AdamW settings; default `AdamW()`.
            memory: budgets and slots; default `MemoryConfig()`.
            max_grad_norm: clip the global gradient norm to this; None: no clipping, less host memory.
            device: "auto", "cpu", "cuda" or "cuda:1".
            compute_dtype: "auto" (bfloat16 on a GPU, float32 on CPU), "bfloat16" or "float32".
            kernels: "auto" (Liger's where installed, on a GPU), "liger" or "torch".
            seed: of random weights and dropout.
            freeze: parameter name patterns that are not trained.
            on_nonfinite: "stop" raises at a NaN loss or gradient, "skip" drops the step.
            self_check: compare a tiny model of the same architecture, streamed, with plain autograd first.

        Raises:
            HorizonError: named by kind; nothing stays allocated.
        """
        check_max_grad_norm(max_grad_norm)
        on_bad = _member(OnNonFinite, on_nonfinite, "on_nonfinite")
        optimizer = optimizer or AdamW()
        skeleton, weights = _open_model(model, revision, trust_remote_code)
        if self_check:
            from horizon.check import ensure_supported  # it builds engines itself

            ensure_supported(skeleton.config)
        runtime = build_runtime(
            skeleton,
            weights,
            optimizer=optimizer,
            memory=memory or MemoryConfig(),
            device=device,
            compute_dtype=_member(ComputeDtype, compute_dtype, "compute_dtype"),
            kernels=_member(Kernels, kernels, "kernels"),
            seed=seed,
            freeze=freeze,
            keeps_gradients=max_grad_norm is not None or on_bad is OnNonFinite.skip,
        )
        return cls(runtime, lr=optimizer.lr, max_grad_norm=max_grad_norm, seed=seed, on_nonfinite=on_bad)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **settings: Any) -> Engine:
        """An engine for a randomly initialised model of a transformers config (a dict with `model_type`).

        Keywords and errors as for `from_pretrained`.
        """
        return cls.from_pretrained(config, **settings)

    # ---- training

    def step(self, batch: Batch | Sequence[Batch], loss_fn: LossFn | None = None) -> StepResult:
        """One optimizer step: forward, backward, clip, update.

        Args:
            batch: dict of `input_ids`, `labels` (not shifted, -100 = not trained) and optionally `attention_mask`,
                `position_ids`, each [rows, tokens]; or a list of such dicts, the step's micro-batches.
            loss_fn: (logits [rows, tokens, vocabulary], batch) -> scalar, instead of next-token cross-entropy; the
                losses of several micro-batches are averaged by their trained tokens. Holds a micro-batch's logits.

        Returns:
            loss, gradient norm, trained tokens, seconds. The update itself runs on behind the next step's forward.

        Raises:
            BatchError, NonFiniteError: the step was not applied.
        """
        started = time.perf_counter()
        self._require_idle("step")
        batches = self._prepare(batch, loss_fn)
        loss = self._guarded(
            lambda: self._runtime.run_step(batches, self._version, self.lr, self._next_seed(), loss_fn)
        )
        return self._apply(loss, batches, sum(b.num_tokens for b in batches), started)

    def forward_backward(self, batch: Batch | Sequence[Batch], loss_fn: LossFn | None = None) -> float:
        """Forward and backward without an update: adds to the gradients that `optimizer_step` applies.

        Gradients of several calls are averaged by trained tokens. They wait on the host in fp32 (4 B/param).

        Returns:
            this call's loss.
        """
        self._require_open()
        self._runtime.keep_fp32_gradients()
        batches = self._prepare(batch, loss_fn)
        tokens = sum(b.num_tokens for b in batches)
        total = self._accumulated + tokens
        loss = self._guarded(
            lambda: self._runtime.accumulate(
                batches, self._version, self._next_seed(), self._accumulated / total, loss_fn
            )
        )
        value = float(loss)
        self._loss = (self._loss * self._accumulated + value * tokens) / total
        self._accumulated, self._has_gradients = total, True
        return value

    def optimizer_step(self) -> StepResult:
        """Clip and apply the gradients of `forward_backward`.

        Raises:
            HorizonError: there are none.
        """
        started = time.perf_counter()
        self._require_open()
        if not self._accumulated:
            raise HorizonError("optimizer_step without gradients: call forward_backward first")
        tokens, self._accumulated = self._accumulated, 0
        return self._apply(torch.tensor(self._loss), self._batches, tokens, started)

    def evaluate(self, batch: Batch | Sequence[Batch], loss_fn: LossFn | None = None) -> float:
        """The loss without gradients: mean over trained tokens (dropout off)."""
        self._require_open()
        batches = self._prepare(batch, loss_fn, keep=False)
        losses = self._guarded(lambda: self._runtime.executor.evaluate(batches, self._version, loss_fn))
        tokens = [b.num_tokens for b in batches]
        weights = tokens if loss_fn is not None else [1] * len(tokens)
        return sum(float(x) * w for x, w in zip(losses, weights, strict=True)) / sum(tokens)

    def next_token_logits(self, batch: Batch) -> Tensor:
        """Logits after each row's last position: fp32 [rows, vocabulary] on the CPU (dropout off)."""
        self._require_open()
        batches = to_micro_batches(batch, self._runtime.device, self.vocab_size, need_labels=False)
        logits = self._guarded(lambda: self._runtime.executor.last_logits(batches, self._version))
        return logits[0].float().cpu()

    # ---- state by name

    def named_master_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, exact fp32 value as a new CPU tensor), in the model's order."""
        self._require_open()
        self._runtime.wait_for_updates(self._version)
        for name in self._runtime.model.parameter_names:
            yield name, self._runtime.store.read_master(name)

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, fp32 gradient on CPU, before clipping) of the last backward; trainable parameters only.

        Raises:
            HorizonError: no backward yet, or gradients are not kept (`step` without clipping updates as they land).
        """
        self._require_open()
        if not self._has_gradients:
            raise HorizonError(
                "no gradients are kept: run a backward first; without clipping use forward_backward instead of step"
            )
        yield from self._runtime.read_gradients()

    def save_pretrained(self, folder: str | Path, tokenizer: Tokenizer | None = None, dtype: str = "float32") -> None:
        """Write a Hugging Face folder from the masters, tensor by tensor.

        Args:
            dtype: of the saved tensors: "float32" keeps the masters exactly, "bfloat16" halves the size.
        """
        self._require_open()
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")
        self._runtime.wait_for_updates(self._version)
        skeleton, read = self._runtime.model.skeleton, self._runtime.store.read_master
        export_model(folder, skeleton, read, getattr(torch, dtype), tokenizer=tokenizer)  # type: ignore[arg-type]

    # ---- facts

    @property
    def plan(self) -> MemoryPlan:
        """Predicted bytes per tier; includes activations once a batch shape is known."""
        return self._runtime.plan

    @property
    def vocab_size(self) -> int:
        """Tokens the model knows."""
        return self._runtime.model.vocab_size

    @property
    def device(self) -> torch.device:
        """Where blocks compute."""
        return self._runtime.device

    @property
    def num_steps(self) -> int:
        """Optimizer steps applied so far."""
        return self._version

    @property
    def host_bytes(self) -> int:
        """Resident host memory of this process, now."""
        return process_bytes()

    @property
    def device_bytes(self) -> int:
        """Device memory this process has taken at its peak; on CPU, the slots that stand in for it."""
        return self._runtime.device_bytes()

    def plan_micro_batch(self, batch_size: int, seq_len: int) -> int:
        """The most rows per micro-batch that fit the device budget for steps of `batch_size` rows.

        Raises:
            BudgetError: not even one row fits.
        """
        self._require_open()
        return self._runtime.plan_micro_batch(batch_size, seq_len)

    # ---- life

    def close(self) -> None:
        """Stop the workers and release all memory. Idempotent."""
        if not self._closed:
            self._closed = True
            self._batches = []
            self._runtime.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, batch: Batch | Sequence[Batch], loss_fn: LossFn | None, keep: bool = True) -> list[MicroBatch]:
        batches = to_micro_batches(batch, self._runtime.device, self.vocab_size, need_labels=loss_fn is None)
        self._runtime.model.check_inputs(sorted({name for b in batches for name in b.inputs}))
        if keep:
            self._batches = batches
        return batches

    def _next_seed(self) -> int:
        self._passes += 1
        return self._seed * 1_000_003 + self._passes

    def _guarded(self, work: Any) -> Any:
        """Run device work; on failure drain what is in flight, so that the next step starts clean."""
        try:
            return self._runtime.guarded(work)
        except BaseException:
            self._has_gradients, self._accumulated = False, 0
            raise

    def _apply(self, loss: Tensor, batches: list[MicroBatch], num_tokens: int, started: float) -> StepResult:
        norm, value = global_norm(self._runtime.gradient_norms()), float(loss)
        step = self._version + 1
        if not (math.isfinite(value) and math.isfinite(float(norm))):
            self._has_gradients = False
            message = self._explain(step, value, batches)
            if self._on_nonfinite is OnNonFinite.stop:
                raise NonFiniteError(f"{message}; set on_nonfinite=skip to drop such steps (train.on_nonfinite)")
            logger.warning("%s; the step is skipped", message)
            return StepResult(value, float(norm), num_tokens, time.perf_counter() - started, skipped=True)
        self._runtime.apply(step, self.lr, clip_scale(norm, self._max_grad_norm))
        self._version = step
        self._has_gradients = self._runtime.keeps_gradients
        return StepResult(value, float(norm), num_tokens, time.perf_counter() - started)

    def _explain(self, step: int, loss: float, batches: list[MicroBatch]) -> str:
        if math.isfinite(loss):
            return f"step {step}: the gradient of {self._runtime.first_bad_gradient()} is not finite (loss {loss:.4g})"
        block = self._guarded(lambda: self._runtime.executor.first_non_finite(batches, self._version))
        where = "head" if block is None else self._runtime.model.layouts[block].name
        return f"step {step}: the loss is {loss}; block {where!r} is the first whose output is not finite"

    def _require_open(self) -> None:
        if self._closed:
            raise HorizonError("the engine is closed")
        self._runtime.store.ledger.raise_if_failed()

    def _require_idle(self, what: str) -> None:
        self._require_open()
        if self._accumulated:
            raise BatchError(f"{what} while gradients of forward_backward wait; call optimizer_step first")


def _open_model(model: Any, revision: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """(skeleton, where its weights come from: a folder, a live model, or None for random ones)."""
    if isinstance(model, str | Path):
        source = resolve_model(str(model), revision, trust_remote_code)
        return build_skeleton(source.folder, trust_remote_code), source.folder if source.has_weights else None
    if isinstance(model, Mapping):
        return build_skeleton(model, trust_remote_code), None
    return skeleton_from_instance(model), model


def _member(kind: Any, value: str, name: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r}: expected one of {', '.join(kind)}") from None
