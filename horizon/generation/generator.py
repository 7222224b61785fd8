"""Sampling from a model that is streamed: one pass over the prompts, then one pass a token, all rows together."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from horizon.errors import BatchError, ConfigError, HorizonError, UnsupportedModelError, one_line
from horizon.frozen import FrozenRuntime
from horizon.generation.arguments import read_arguments, total_tokens
from horizon.generation.cache import LayerShape, allocated, shape_of
from horizon.generation.streamed import StreamedModel
from horizon.models.structure import LastLayerReached
from horizon.plan.kv_cache import CachePlan, plan_cache
from horizon.plan.memory import MemoryPlan
from horizon.runtime import Runtime
from horizon.zo.runtime import ZerothOrderRuntime

CHOICE_BYTES = 40  # per row and entry of the vocabulary: logits in fp32, sorted with indices, summed, drawn from


@dataclass(frozen=True, slots=True)
class _Asked:
    """One generation, planned."""

    config: GenerationConfig
    objects: dict[str, Any]
    rows: int
    total_tokens: int  # of a row, at the end
    shapes: list[LayerShape]
    planned: CachePlan


class Generator:
    """Generates with one engine's runtime, and knows what its passes take."""

    def __init__(self, runtime: Runtime | ZerothOrderRuntime | FrozenRuntime):
        self._runtime, self._model = runtime, runtime.model
        self._measured: dict[tuple[int, int], tuple[list[LayerShape], int]] = {}  # by rows and tokens of the prompts
        self._streamed = StreamedModel(
            self._model, lambda blocks: runtime.executor.visits(runtime.version, blocks), runtime.device
        )

    def plan(self, rows: int, prompt_tokens: int, arguments: Mapping[str, Any]) -> MemoryPlan:
        """The memory of the engine while it goes on with prompts of that shape.

        Raises:
            BudgetError: it does not fit.
        """
        return self._read(rows, prompt_tokens, arguments).planned.memory

    def generate(self, inputs: Mapping[str, Tensor], arguments: Mapping[str, Any], seed: int | None) -> Tensor:
        """Token ids on the device, [rows * num_return_sequences, tokens], prompts included.

        Args:
            inputs: input_ids and, where any token is masked, attention_mask, each [rows, tokens] on the device.
            arguments: as transformers' `generate` takes them.
            seed: of what is drawn; None: torch's own generators go on.
        """
        runtime, ids = self._runtime, inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        _refuse_right_padding(mask)
        asked = self._read(len(ids), ids.shape[1], arguments)
        before, runtime.plan = runtime.plan, asked.planned.memory

        def run() -> Tensor:
            on_device = asked.planned.on_device
            cache = allocated(asked.shapes, asked.rows, asked.total_tokens, on_device, runtime.device)
            with self._streamed.open() as model, cache as past, _drawing(seed, runtime.device), _named_errors():
                model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # the model's own has been read
                found = model.generate(  # type: ignore[operator]
                    ids, attention_mask=mask, past_key_values=past, generation_config=asked.config, **asked.objects
                )
                return found  # type: ignore[no-any-return]

        try:
            return runtime.guarded(run)
        finally:
            runtime.plan = before

    # ---- what passes take

    def _read(self, rows: int, prompt_tokens: int, arguments: Mapping[str, Any]) -> _Asked:
        """What is asked for, and where its keys and values go."""
        config, objects = read_arguments(self._model.skeleton.generation_config, arguments)
        total = total_tokens(config, prompt_tokens, self._model.max_positions)
        rows *= config.num_return_sequences or 1
        return _Asked(config, objects, rows, total, *self._planned(rows, prompt_tokens, total))

    def _planned(self, rows: int, prompt_tokens: int, total: int) -> tuple[list[LayerShape], CachePlan]:
        on_cpu = self._runtime.device.type == "cpu"
        key = (1, 2) if on_cpu else (rows, prompt_tokens)  # there shapes are all that is looked at
        if key not in self._measured:
            self._measured[key] = self._runtime.guarded(lambda: self._measure(*key))
        shapes, of_prompts = self._measured[key]
        working = 0 if on_cpu else of_prompts + self._attention_bytes(shapes, rows, total)
        layers = [shape.cache for shape in shapes]
        return shapes, plan_cache(_without_steps(self._runtime.plan), layers, rows, total, working)

    @torch.no_grad()
    def _measure(self, rows: int, tokens: int) -> tuple[list[LayerShape], int]:
        """What every layer keeps, and the device bytes of a pass, found by running one layer of each kind."""
        model, device, name = self._model, self._runtime.device, type(self._model.skeleton).__name__
        cache, layouts = DynamicCache(config=model.config), model.layouts[1:-1]
        if len(cache.layers) != len(layouts):
            raise UnsupportedModelError(f"{name}: transformers' cache has {len(cache.layers)} of {len(layouts)} layers")
        kinds = [(lay.num_elements, type(layer)) for lay, layer in zip(layouts, cache.layers, strict=True)]
        first = {kind: kinds.index(kind) for kind in kinds}
        ids = torch.randint(model.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0)).to(device)
        mask = torch.ones_like(ids)
        mask[0, : tokens // 2] = 0  # as prompts of different lengths are padded
        bytes_before = _begin_peak(device)
        blocks = [0, *(layer + 1 for layer in sorted(first.values()))]
        with self._streamed.open(blocks) as streamed, suppress(LastLayerReached):
            streamed(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        peak = _peak(device) - bytes_before
        measured = {kind: shape_of(cache.layers[layer], name) for kind, layer in first.items()}
        kept = sum(shape.cache.num_bytes(rows, tokens) for shape in measured.values())
        choosing = rows * model.vocab_size * CHOICE_BYTES
        if "logits_to_keep" not in inspect.signature(model.skeleton.forward).parameters:
            choosing *= tokens  # the model computes logits of all of the prompts
        return [measured[kind] for kind in kinds], max(0, peak - kept) + choosing

    def _attention_bytes(self, shapes: list[LayerShape], rows: int, total: int) -> int:
        """Device bytes that attention over all of a row's tokens may take: the heads of keys and values, repeated."""
        heads = getattr(self._model.config, "num_attention_heads", 1)
        return max(s.cache.num_bytes(rows, total) * (1 + -(-heads // s.heads)) for s in shapes)


def _without_steps(plan: MemoryPlan) -> MemoryPlan:
    """The plan between two steps: what they have left on the host stays there."""
    return plan.with_activations([line for line in plan.activations if line.tier != "device"])


def _begin_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.max_memory_allocated(device)


def _refuse_right_padding(mask: Tensor) -> None:
    real = mask.bool()
    if bool((real[:, :-1] & ~real[:, 1:]).any()) or not bool(real[:, -1].all()):
        raise BatchError(
            "attention_mask masks tokens behind others: prompts are padded on the left "
            "(tokenizer.padding_side='left'), so that what follows them begins at the same place"
        )


@contextmanager
def _drawing(seed: int | None, device: torch.device) -> Iterator[None]:
    """While open, what is drawn follows from the seed, and other random numbers go on as if nothing was drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices) if seed is not None else nullcontext():
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def _named_errors() -> Iterator[None]:
    """What transformers says of arguments that do not go together is an error of the caller's settings."""
    try:
        yield
    except HorizonError:
        raise
    except ValueError as error:
        raise ConfigError(f"generate: {one_line(error)}") from error
