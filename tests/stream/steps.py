"""Whole steps of the real executor on a tiny model, on recorded streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch

from horizon.config.schema import Recompute
from horizon.models.blocks import BlockModel
from horizon.models.skeleton import build_skeleton, init_parameters
from horizon.store.gradients import KeptGradients
from horizon.store.host import HostStore
from horizon.store.offload import HostRegions
from horizon.stream.batch import MicroBatch, to_micro_batches
from horizon.stream.boundaries import Boundaries
from horizon.stream.executor import Executor, ExecutorSettings
from horizon.stream.gradients import GradientSlots
from tests.stream.recorder import RecordedSink, RecordedStreams, Recorder, Site

VOCAB, ROWS, TOKENS, HIDDEN = 96, 2, 5, 32


@cache
def tiny_model(layers: int = 3, tied: bool = False, freeze: tuple[str, ...] = ()) -> BlockModel:
    """A llama of a few blocks: embed, layers.0 .. layers.n-1, head."""
    config = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied,
        "max_position_embeddings": 64,
    }  # fmt: skip
    return BlockModel(build_skeleton(config), freeze)


def filled_store(model: BlockModel, in_hbm: Set[int] = frozenset()) -> HostStore:
    store = HostStore(model.layouts, pin=False, pin_residual=False, in_hbm=in_hbm)
    for name, value in init_parameters(model.skeleton):
        store.write_master(name, value)
    return store


def settings_of(model: BlockModel, dtype: torch.dtype, weight_slots: int, turn_layers: int) -> ExecutorSettings:
    turn = range(model.head - turn_layers, model.head)
    return ExecutorSettings(dtype, weight_slots, head_chunk=64, turn=turn)


def use_buffers(executor: Executor, buffers: KeptGradients, drain_slots: int) -> None:
    with mock.patch.object(GradientSlots.__init__, "__defaults__", (drain_slots, ())):
        executor.use_buffers(buffers)


def micro_batches(num: int) -> list[MicroBatch]:
    tokens = torch.randint(0, VOCAB, (num, ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    return to_micro_batches([{"input_ids": t, "labels": t} for t in tokens], torch.device("cpu"), VOCAB)


def record_steps(
    *,
    model: BlockModel,
    num_micro_batches: int = 1,
    weight_slots: int = 2,
    drain_slots: int = 2,
    compute_dtype: torch.dtype = torch.bfloat16,
    grad_dtype: torch.dtype = torch.float32,
    offloaded: Sequence[int] = (),
    in_hbm: Set[int] = frozenset(),
    old_shares: Sequence[float] = (0.0,),
    recompute: Mapping[int, Recompute] | None = None,
    turn_layers: int = 0,
    dropped: Site | None = None,
) -> Recorder:
    """Run one step per element of `old_shares`, weights updated in between; return what was seen."""
    recorder = Recorder(dropped)
    streams = RecordedStreams(recorder)
    store = filled_store(model, in_hbm)
    executor = Executor(model, store, streams, settings_of(model, compute_dtype, weight_slots, turn_layers))
    buffers = KeptGradients(model.layouts, grad_dtype, pin=False, in_hbm=in_hbm)
    use_buffers(executor, buffers, drain_slots)
    grads = [buffers.claim(lay.index) for lay in model.layouts]
    sink = RecordedSink(recorder, grads, [store.weights, store.residual], in_hbm)
    keys = [(block, m) for block in offloaded for m in range(num_micro_batches)]
    space = {key: [torch.empty(ROWS * TOKENS * HIDDEN * compute_dtype.itemsize, dtype=torch.uint8)] for key in keys}
    _name_memory(recorder, model, store, buffers, space, executor)
    batches = micro_batches(num_micro_batches)
    with _labelled(model, executor, recorder, num_micro_batches), recorder:
        for version, share in enumerate(old_shares):
            boundaries = Boundaries(streams, HostRegions(space))
            executor.train(batches, version, boundaries, sink, seed=version, recompute=recompute or {}, old_share=share)
            sink.finish()
            for layout in model.layouts:
                store.ledger.publish(layout.index, version + 1)
    return recorder


def _name_memory(
    recorder: Recorder, model: BlockModel, store: HostStore, buffers: KeptGradients, space: Any, executor: Executor
) -> None:
    assert executor.gradients is not None and executor._turn_around is not None
    recorder.name(executor._turn_around._host_loss, "loss")
    recorder.name(executor.gradients._host_norms, "norms")
    for key, (region,) in space.items():
        recorder.name(region, f"boundary {model.layouts[key[0]].name} m{key[1]}")
    for layout in model.layouts:
        recorder.name(store.weights[layout.index], f"weights {layout.name}")
        recorder.name(store.residual[layout.index], f"residual {layout.name}")
        if layout.num_trainable:
            recorder.name(buffers.claim(layout.index), f"gradient {layout.name}")


@contextmanager
def _labelled(model: BlockModel, executor: Executor, recorder: Recorder, num: int) -> Iterator[None]:
    """Have the log say what compute does: forward, recompute and backward per block and micro-batch."""
    calls: Counter[str] = Counter()
    passes, grad = executor._passes, torch.autograd.grad

    def count(what: str) -> str:
        calls[what] += 1
        return f"{what} m{(calls[what] - 1) % num}"

    def labelled(run: Callable[..., Any], verb: str, block: int | None = None) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls["block"] = args[0] if block is None else block
            recorder.label("compute", count(f"{verb} {model.layouts[calls['block']].name}"))
            return run(*args, **kwargs)

        return wrapped

    def labelled_grad(*args: Any, **kwargs: Any) -> Any:
        recorder.label("compute", count(f"backward {model.layouts[calls['block']].name}"))
        return grad(*args, **kwargs)

    def kept(key: tuple[int, int], *args: Any) -> Any:
        calls["block"] = key[0]
        return backward_kept(key, *args)

    backward_kept = passes.backward_kept
    with (
        mock.patch.object(model, "embed", labelled(model.embed, "forward", 0)),
        mock.patch.object(model, "layer", labelled(model.layer, "forward")),
        mock.patch.object(model, "differentiable_layer", labelled(model.differentiable_layer, "forward")),
        mock.patch.object(model, "recompute", labelled(model.recompute, "recompute")),
        mock.patch.object(model, "logits", labelled(model.logits, "forward", model.head)),
        mock.patch.object(passes, "backward_kept", kept),
        mock.patch("torch.autograd.grad", labelled_grad),
    ):
        yield
