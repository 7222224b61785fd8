"""A model that is used: held-out losses, scores of tokens, and text that it goes on with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import GenerationConfig

from horizon.building import build_frozen_parts
from horizon.config.schema import MemoryConfig
from horizon.diagnosis import said_beside
from horizon.errors import HorizonError
from horizon.frozen import FrozenRuntime
from horizon.generation.generator import Generator
from horizon.plan.machine import process_bytes
from horizon.plan.memory import MemoryPlan
from horizon.runtime import Runtime
from horizon.stream.batch import Batch, MicroBatch, num_trained_tokens, to_micro_batches
from horizon.stream.head import LossFn, TokenScores
from horizon.zo.runtime import ZerothOrderRuntime


class InferenceEngine:
    """One causal LM in host memory, computed through the device a block at a time, without gradients.

    Build one with `from_pretrained` or `load_checkpoint`. The host keeps what blocks compute with and nothing else: 2
    bytes a parameter in bfloat16, 4 in float32. It is a context manager; `close` releases all memory. Not for use from
    several threads.

    Attributes:
        plan: predicted bytes per tier.
    """

    def __init__(self, runtime: Runtime | ZerothOrderRuntime | FrozenRuntime):
        self._runtime, self._generator = runtime, Generator(runtime)
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        *,
        memory: MemoryConfig | None = None,
        device: str = "auto",
        compute_dtype: str = "auto",
        kernels: str = "auto",
        seed: int = 0,
        revision: str | None = None,
        trust_remote_code: bool = False,
        self_check: bool = True,
    ) -> Self:
        """An engine for a Hugging Face causal LM.

        Args:
            model: a folder (with only a config.json: random weights; with peft's adapter: that on its base), a hub
                id, a transformers config as a dict, or a live transformers model, whose weights are copied and which is
                left as it is; a `peft.PeftModel` with a LoRA adapter, too.
            memory: budgets and slots; default `MemoryConfig()`.
            device: "auto", "cpu", "cuda" or "cuda:1".
            compute_dtype: "auto" (bfloat16 on a GPU, float32 on CPU), "bfloat16" or "float32".
            kernels: "auto" (Liger's where installed, on a GPU), "liger" or "torch".
            seed: of random weights.
            self_check: compare a tiny model of the same architecture, streamed, with plain autograd first.

        Raises:
            HorizonError: named by kind; nothing stays allocated.
        """
        return cls(
            build_frozen_parts(
                model, None, memory=memory, device=device, compute_dtype=compute_dtype, kernels=kernels, seed=seed,
                revision=revision, trust_remote_code=trust_remote_code, self_check=self_check,
            )
        )  # fmt: skip

    @classmethod
    def load_checkpoint(cls, folder: str | Path, *, model: Any = None, **settings: Any) -> Self:
        """An engine with the weights of a checkpoint.

        Args:
            model: of which it is, where the checkpoint alone does not tell: a folder with code of its own.
            settings: as `from_pretrained` takes them.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        return cls(build_frozen_parts(model, Path(folder), **settings))

    def evaluate(self, batch: Batch | Sequence[Batch], loss_fn: LossFn | None = None) -> float:
        """The loss: mean over the trained tokens of all batches, which go through each block together."""
        batches, runtime = self._prepare(batch, loss_fn is None), self._runtime
        losses = runtime.guarded(lambda: [*map(float, runtime.executor.evaluate(batches, runtime.version, loss_fn))])
        weights = [1 if loss_fn is None else b.num_tokens for b in batches]
        return sum(loss * w for loss, w in zip(losses, weights, strict=True)) / num_trained_tokens(batches)

    def score(self, batch: Batch | Sequence[Batch]) -> list[TokenScores]:
        """How well every trained token is predicted, batch by batch, on the CPU.

        Losses, perplexity and accuracy of any part of the rows follow from it (`horizon.eval.metrics`), without
        another pass.
        """
        batches, runtime = self._prepare(batch, need_labels=True), self._runtime
        return runtime.guarded(lambda: [s.cpu() for s in runtime.executor.score(batches, runtime.version)])

    def next_token_logits(self, batch: Batch | Sequence[Batch]) -> Tensor:
        """Logits after each row's last position: fp32 [rows, vocabulary] on the CPU."""
        batches, runtime = self._prepare(batch, need_labels=False), self._runtime
        logits = runtime.guarded(lambda: [x.cpu() for x in runtime.executor.last_logits(batches, runtime.version)])
        return torch.cat(logits).float()

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, seed: int | None = None, **arguments: Any
    ) -> Tensor:
        """Go on with a batch of prompts, as transformers' `generate`: one pass over the prompts, then one a token.

        Keys and values are on the device as far as its budget goes, then on the host.

        Args:
            input_ids: [rows, tokens], padded on the left.
            attention_mask: [rows, tokens], 0 where there is padding; None: there is none.
            seed: of sampling; None: torch's own random numbers go on.
            arguments: attributes of transformers' GenerationConfig, on top of the model's own: max_new_tokens,
                do_sample, temperature, top_k, top_p, repetition_penalty, eos_token_id, num_return_sequences, ...; or
                generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, streamer, and, for
                stop_strings, tokenizer.

        Returns:
            token ids on the CPU, [rows * num_return_sequences, tokens], prompts included; what ends early is padded.

        Raises:
            BatchError: the prompts are not such.
            ConfigError: an argument that there is not or that cannot be streamed, such as num_beams.
            BudgetError: keys and values do not fit; nothing was allocated.
        """
        masks = {} if attention_mask is None else {"attention_mask": attention_mask}
        (prompts,) = self._prepare({"input_ids": input_ids, **masks}, need_labels=False)
        return self._generator.generate(prompts.inputs, arguments, seed).cpu()

    def plan_generation(self, rows: int, prompt_tokens: int, **arguments: Any) -> MemoryPlan:
        """The memory of `generate` with the same arguments and prompts of that shape, keys and values included.

        Raises:
            BudgetError: it does not fit.
        """
        self._require_open()
        return self._generator.plan(rows, prompt_tokens, arguments)

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
    def max_positions(self) -> int | None:
        """Tokens that a row may have; None where any position can be computed."""
        return self._runtime.model.max_positions

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's own settings for `generate`."""
        found: GenerationConfig = self._runtime.model.skeleton.generation_config
        return found

    @property
    def device(self) -> torch.device:
        """Where blocks compute."""
        return self._runtime.device

    @property
    def host_bytes(self) -> int:
        """Resident host memory of this process, now."""
        return process_bytes()

    @property
    def device_bytes(self) -> int:
        """Device memory this process has taken at its peak; on CPU, the slots that stand in for it."""
        return self._runtime.device_bytes()

    def close(self) -> None:
        """Release all memory. Idempotent."""
        if not self._closed:
            self._closed = True
            self._runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with said_beside(error):
            self.close()

    def _prepare(self, batch: Batch | Sequence[Batch], need_labels: bool) -> list[MicroBatch]:
        self._require_open()
        runtime, limit = self._runtime, self._runtime.model.max_positions
        batches = to_micro_batches(batch, runtime.device, self.vocab_size, max_positions=limit, need_labels=need_labels)
        runtime.model.check_inputs(sorted({name for b in batches for name in b.inputs}))
        return batches

    def _require_open(self) -> None:
        if self._closed:
            raise HorizonError("the engine is closed")
        self._runtime.raise_if_failed()
