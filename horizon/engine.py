"""The engine: one model in host memory, trained through the device a block at a time.

Composes adapter, plan, store, executor and optimizer; everything a training script needs and nothing of data,
schedules or reports.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from horizon import checkpoints
from horizon.building import Parts, build_parts
from horizon.checkpoint.model_folder import Tokenizer
from horizon.checkpoint.saves import Save
from horizon.config.schema import LoraConfig, MemoryConfig
from horizon.diagnosis import report_dropped
from horizon.errors import BatchError, ConfigError, HorizonError
from horizon.inference import InferenceEngine
from horizon.optim.adamw import AdamW
from horizon.optim.steps import StepOutcome, WaitingGradients
from horizon.records import StepResult
from horizon.report.recording import Recording
from horizon.runtime import Runtime
from horizon.stream.batch import Batch, MicroBatch, num_trained_tokens
from horizon.stream.head import LossFn
from horizon.zo.replay import ReplayLog
from horizon.zo.runtime import ZerothOrderOutcome, ZerothOrderRuntime, of_zeroth_order, require_gradients
from horizon.zo.settings import ZerothOrder

T = TypeVar("T")


class Engine(InferenceEngine):
    """Trains one causal LM whose parameters and optimizer state live in host memory.

    Build one with `from_pretrained` or `from_config`. It is a context manager; `close` releases all memory.
    Not for use from several threads.

    Attributes:
        lr: learning rate of the next step; set it to follow a schedule.
        plan: predicted bytes per tier.
    """

    _runtime: Runtime | ZerothOrderRuntime

    def __init__(self, parts: Parts, seed: int):
        super().__init__(parts.runtime)
        self.lr = parts.lr
        self._clipping, self._seed, self._on_nonfinite = parts.clipping, seed, parts.on_nonfinite
        self._num_passes = 0  # backward passes so far: each draws its own dropout masks
        self._waiting = WaitingGradients()
        self._has_gradients = False

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        *,
        optimizer: AdamW | ZerothOrder | None = None,
        memory: MemoryConfig | None = None,
        max_grad_norm: float | None = 1.0,
        device: str = "auto",
        compute_dtype: str = "auto",
        kernels: str = "auto",
        seed: int = 0,
        freeze: Sequence[str] = (),
        lora: LoraConfig | Mapping[str, Any] | None = None,
        on_nonfinite: str = "stop",
        clip: str = "exact",
        revision: str | None = None,
        trust_remote_code: bool = False,
        self_check: bool = True,
    ) -> Engine:
        """An engine for a Hugging Face causal LM.

        Args:
            model: a folder (with only a config.json: random weights; with peft's adapter: that on its base), a hub
                id, a transformers config as a dict, or a live transformers model, whose weights are copied and which is
                left as it is; a `peft.PeftModel` with a LoRA adapter, too.
            optimizer: settings of AdamW or of zeroth-order steps; default `AdamW()`.
            memory: budgets and slots; default `MemoryConfig()`.
            max_grad_norm: of AdamW: clip the global gradient norm to this; None: no clipping, less host memory.
            device: "auto", "cpu", "cuda" or "cuda:1".
            compute_dtype: "auto" (bfloat16 on a GPU, float32 on CPU), "bfloat16" or "float32".
            kernels: "auto" (Liger's where installed, on a GPU), "liger" or "torch".
            seed: of random weights and dropout.
            freeze: parameter name patterns that are not trained.
            lora: of an adapter to train instead of the model, or as a dict what peft calls its settings; needs peft.
            on_nonfinite: "stop" raises at a NaN loss or gradient, "skip" drops the step.
            clip: "exact" updates when the norm is known; "speculative" begins before, and where the norm then clips,
                takes back what it did, up to rounding; "lagged" clips to the norm of the step before.
            self_check: compare a tiny model of the same architecture, streamed, with plain autograd first.

        Raises:
            HorizonError: named by kind; nothing stays allocated.
        """
        parts = build_parts(
            model, optimizer=optimizer, memory=memory, max_grad_norm=max_grad_norm, device=device, clip=clip,
            compute_dtype=compute_dtype, kernels=kernels, seed=seed, freeze=freeze, on_nonfinite=on_nonfinite,
            revision=revision, trust_remote_code=trust_remote_code, self_check=self_check, lora=lora,
        )  # fmt: skip
        return cls(parts, seed)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **settings: Any) -> Engine:
        """An engine with random weights, of a transformers config (a dict with `model_type`); see `from_pretrained`."""
        return cls.from_pretrained(config, **settings)

    # ---- training

    def step(self, batch: Batch | Sequence[Batch], loss_fn: LossFn | None = None) -> StepResult:
        """One optimizer step: forward, backward, clip, update; of zeroth order, two forward passes a query.

        Args:
            batch: dict of `input_ids`, `labels` (not shifted, -100 = not trained) and optionally `attention_mask`,
                `position_ids`, each [rows, tokens]; or a list of such dicts, the step's micro-batches.
            loss_fn: (logits [rows, tokens, vocabulary], batch) -> scalar, instead of next-token cross-entropy; the
                losses of several micro-batches are averaged by their trained tokens. Holds a micro-batch's logits. Of
                zeroth order any number will do; else it must be a tensor with a gradient.

        Returns:
            loss, gradient norm (or projected gradients), trained tokens, seconds. The update itself runs on behind the
            next step's forward.

        Raises:
            BatchError, NonFiniteError: the step was not applied; the engine can go on. Without clipping, a gradient
                that is not finite under a finite loss is noticed too late for that: the engine keeps raising.
        """
        started = self._begin_step()
        if self._waiting.num_tokens:
            raise BatchError("step while gradients of forward_backward wait; call optimizer_step first")
        batches, step = self._prepare(batch, loss_fn is None), self.num_steps + 1
        outcome = self._run_pass(lambda seed: self._runtime.run_step(batches, self.lr, seed, loss_fn))
        return self._result(step, outcome, batches, num_trained_tokens(batches), started)

    def forward_backward(self, batch: Batch | Sequence[Batch], loss_fn: LossFn | None = None) -> float:
        """Forward and backward without an update: adds to the gradients that `optimizer_step` applies.

        Gradients of several calls are averaged by trained tokens. They wait on the host in fp32 (4 B/param). A
        call that fails half-way takes the gradients of the calls before it along.

        Returns:
            this call's loss.

        Raises:
            BatchError: nothing was added.
            HorizonError: the optimizer is of zeroth order and computes no gradients.
        """
        runtime = require_gradients(self._runtime, "forward_backward")
        batches, waiting = self._prepare(batch, loss_fn is None), self._waiting
        tokens = num_trained_tokens(batches)

        def accumulate(seed: int) -> Tensor:
            runtime.keep_fp32_gradients()
            return runtime.accumulate(batches, seed, waiting.share_beside(tokens), loss_fn)

        loss = float(self._run_pass(accumulate))
        self._waiting, self._has_gradients = waiting.joined(tokens, loss, batches), True
        return loss

    def optimizer_step(self) -> StepResult:
        """Clip and apply the gradients of `forward_backward`.

        Raises:
            HorizonError: there are none.
            NonFiniteError: they were dropped; the engine can go on.
        """
        started, runtime = self._begin_step(), require_gradients(self._runtime, "optimizer_step")
        if not self._waiting.num_tokens:
            raise HorizonError("optimizer_step without gradients: call forward_backward first")
        waiting, self._waiting = self._waiting, WaitingGradients()
        step, outcome = self.num_steps + 1, runtime.apply(self.lr, waiting.loss)
        return self._result(step, outcome, waiting.batches, waiting.num_tokens, started)

    # ---- state by name

    def named_master_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, exact fp32 value as a new CPU tensor), in the model's order."""
        self._require_open()
        self._runtime.wait_for_updates()
        return ((name, self._runtime.store.read_master(name)) for name in self._runtime.model.parameter_names)

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, fp32 gradient on CPU, before clipping) of the last backward; trainable parameters only.

        Raises:
            HorizonError: no backward yet, or gradients are not kept (`step` without clipping updates as they land).
        """
        self._require_open()
        runtime = require_gradients(self._runtime, "named_gradients")
        if not self._has_gradients:
            raise HorizonError(
                "no gradients are kept: run a backward first; without clipping use forward_backward instead of step"
            )
        return runtime.read_gradients()

    def save_pretrained(self, folder: str | Path, tokenizer: Tokenizer | None = None, dtype: str = "float32") -> None:
        """Write a Hugging Face folder from the masters, tensor by tensor; of a model with an adapter, peft's of that.

        Args:
            dtype: of the saved tensors: "float32" keeps the masters exactly, "bfloat16" halves the size.
        """
        self._require_open()
        checkpoints.export(self._runtime, folder, dtype, tokenizer)

    # ---- checkpoints

    @classmethod
    def load_checkpoint(
        cls, folder: str | Path, *, model: Any = None, weights_only: bool = False, **settings: Any
    ) -> Engine:
        """An engine that goes on from a checkpoint or, `weights_only`, begins at step 0 with its weights.

        The model, whose own weights are not read, is by default what the checkpoint says; so are optimizer and seed.
        """
        return checkpoints.load(cls.from_pretrained, folder, model, weights_only, settings)

    def plan_checkpoints(self, staging: str = "auto") -> None:
        """Plan saves: `plan` then includes the host memory that they are written from. Else the first save does."""
        self._require_open()
        checkpoints.of_adamw(self._runtime, "plan_checkpoints").plan_saves(staging)

    def save_checkpoint(
        self, folder: str | Path, *, run: dict[str, Any] | None = None, tokenizer: Tokenizer | None = None
    ) -> Save:
        """Begin to write a checkpoint of this moment and return at once: training may go on meanwhile.

        The folder appears when all of it is on disk. `run`: plain JSON values that `restore` gives back.

        Raises:
            CheckpointError: it cannot begin. If it fails later, `wait` and the engine's next call raise that.
        """
        self._require_open()
        if self._waiting.num_tokens:
            raise HorizonError("save_checkpoint while gradients of forward_backward wait; call optimizer_step first")
        return checkpoints.begin_save(self._runtime, folder, self._num_passes, self._seed, run or {}, tokenizer)

    def restore(self, folder: str | Path, *, weights_only: bool = False) -> dict[str, Any]:
        """Go on from a checkpoint of this model, however that was placed; returns what `run` was when it was saved.

        Raises:
            CheckpointError: it is damaged, or (the engine can go on) model or optimizer are others; names what differs.
        """
        self._require_open()
        manifest = checkpoints.restore(self._runtime, folder, weights_only)
        self._num_passes, self._waiting, self._has_gradients = manifest.passes, WaitingGradients(), False
        return manifest.run

    # ---- zeroth order: a run is its log

    @property
    def replay_log(self) -> ReplayLog:
        """The steps so far; raises a HorizonError, as the next two do, where the optimizer is not of zeroth order."""
        return of_zeroth_order(self._runtime, "replay_log").log

    def log_steps(self, path: str | Path, model: str = "") -> None:
        """Write the steps so far, and each one from now on, to a replay log; `model` says there what it began with."""
        self._require_open()
        of_zeroth_order(self._runtime, "log_steps").log_steps(Path(path), model)

    def replay(self, path: str | Path) -> int:
        """Take the steps of a replay log, before any other; gives their number, after which training can go on.

        Raises:
            CheckpointError: the log cannot be read, or belongs to other weights or settings.
            HorizonError: the engine has taken steps.
        """
        self._require_open()
        return of_zeroth_order(self._runtime, "replay").replay(Path(path))

    # ---- facts

    @property
    def num_steps(self) -> int:
        """Optimizer steps applied so far."""
        return self._runtime.version

    def plan_micro_batch(self, batch_size: int, seq_len: int, rows: int | None = None) -> int:
        """Plan steps of `batch_size` rows; `plan` then includes their activations.

        Returns:
            rows per micro-batch: `rows`, or what suits the device budget best.

        Raises:
            BudgetError: they do not fit; without `rows`, not even one row does.
            ConfigError: the model has no positions for rows of that length.
        """
        self._require_open()
        return self._runtime.plan_micro_batch(batch_size, seq_len, rows)

    def trace(
        self, path: str | Path | None = None, picture: str | Path | None = None
    ) -> AbstractContextManager[Recording]:
        """`with engine.trace("trace.json") as recording:` records the steps inside; see `Recording` for what it holds.

        Args:
            path: written for Perfetto (https://ui.perfetto.dev) when the block ends; None: no file.
            picture: a PNG of one of the steps; needs matplotlib.

        Raises:
            HorizonError: steps are being recorded already, or none ended inside.
        """
        self._require_open()
        return self._runtime.recorded(*(None if file is None else Path(file) for file in (path, picture)))

    def close(self) -> None:
        """Stop the workers, when a save under way is on disk, and release all memory. Idempotent."""
        self._waiting = WaitingGradients()
        super().close()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None and not isinstance(error, Exception):
            self._runtime.abandon_saves()  # Ctrl-C: who waits for a disk does not stop at once
        super().__exit__(kind, error, at)

    def _run_pass(self, work: Callable[[int], T]) -> T:
        """Run `work(seed of the dropout masks)`, one backward pass; if it fails, the gradients on the host are void."""
        try:
            found = self._runtime.guarded(lambda: work(self._seed * 1_000_003 + self._num_passes + 1))
        except BaseException:
            self._has_gradients, self._waiting = False, WaitingGradients()
            raise
        self._num_passes += 1
        return found

    def _result(
        self, step: int, outcome: StepOutcome | ZerothOrderOutcome, batches: list[MicroBatch], num_tokens: int,
        started: float,
    ) -> StepResult:  # fmt: skip
        if outcome.applied is None:
            self._has_gradients = False
            report_dropped(self._runtime, step, outcome.loss, batches, self._on_nonfinite, self._clipping)
        self._has_gradients = self._runtime.keeps_gradients and outcome.applied is not None
        self._runtime.streams.timeline.end_step()
        return outcome.result(num_tokens, time.perf_counter() - started)

    def _begin_step(self) -> float:
        self._require_open()
        if not 0 <= self.lr < math.inf:
            raise ConfigError(f"engine.lr={self.lr}: expected a finite number >= 0")
        return time.perf_counter()
