"""Whole steps of the real executor on a tiny model, on recorded streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch

from horizon.models.blocks import BlockModel
from horizon.models.skeleton import build_skeleton, init_parameters
from horizon.store.gradients import KeptGradients
from horizon.store.host import HostStore
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


def filled_store(model: BlockModel) -> HostStore:
    store = HostStore(model.layouts, pin=False, pin_residual=False)
    for name, value in init_parameters(model.skeleton):
        store.write_master(name, value)
    return store


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
    old_shares: Sequence[float] = (0.0,),
    dropped: Site | None = None,
) -> Recorder:
    """Run one step per element of `old_shares`, weights updated in between; return what was seen."""
    recorder = Recorder(dropped)
    streams = RecordedStreams(recorder)
    store = filled_store(model)
    executor = Executor(model, store, streams, ExecutorSettings(compute_dtype, weight_slots, head_chunk=64))
    buffers = KeptGradients(model.layouts, grad_dtype, pin=False)
    executor.gradients = GradientSlots(streams, model.layouts, buffers, drain_slots)
    grads = [buffers.claim(lay.index) for lay in model.layouts]
    sink = RecordedSink(recorder, grads, [store.weights, store.residual])
    keys = [(block, m) for block in offloaded for m in range(num_micro_batches)]
    space = {key: torch.empty(ROWS * TOKENS * HIDDEN * compute_dtype.itemsize, dtype=torch.uint8) for key in keys}
    _name_memory(recorder, model, store, buffers, space, executor)
    batches = micro_batches(num_micro_batches)
    with _labelled(model, recorder, num_micro_batches), recorder:
        for version, share in enumerate(old_shares):
            boundaries = Boundaries(streams, space)
            executor.train(batches, version, boundaries, sink, seed=version, old_share=share)
            sink.finish()
            for layout in model.layouts:
                store.ledger.publish(layout.index, version + 1)
    return recorder


def _name_memory(
    recorder: Recorder, model: BlockModel, store: HostStore, buffers: KeptGradients, space: Any, executor: Executor
) -> None:
    recorder.name(executor._host_loss, "loss")
    assert executor.gradients is not None
    recorder.name(executor.gradients._host_norms, "norms")
    for key, region in space.items():
        recorder.name(region, f"boundary {model.layouts[key[0]].name} m{key[1]}")
    for layout in model.layouts:
        recorder.name(store.weights[layout.index], f"weights {layout.name}")
        recorder.name(store.residual[layout.index], f"residual {layout.name}")
        if layout.num_trainable:
            recorder.name(buffers.claim(layout.index), f"gradient {layout.name}")


@contextmanager
def _labelled(model: BlockModel, recorder: Recorder, num: int) -> Iterator[None]:
    """Have the log say what compute does: forward, recompute and backward per block and micro-batch."""
    calls: Counter[str] = Counter()
    embed, layer, logits, grad = model.embed, model.layer, model.logits, torch.autograd.grad

    def count(what: str) -> str:
        calls[what] += 1
        return f"{what} m{(calls[what] - 1) % num}"

    def forward(block: int) -> None:
        verb = "recompute" if torch.is_grad_enabled() and block != model.head else "forward"
        recorder.label("compute", count(f"{verb} {model.layouts[block].name}"))
        calls["block"] = block

    def labelled_grad(*args: Any, **kwargs: Any) -> Any:
        recorder.label("compute", count(f"backward {model.layouts[calls['block']].name}"))
        return grad(*args, **kwargs)

    with (
        mock.patch.object(model, "embed", lambda *args: (forward(0), embed(*args))[1]),
        mock.patch.object(model, "layer", lambda block, *args: (forward(block), layer(block, *args))[1]),
        mock.patch.object(model, "logits", lambda *args: (forward(model.head), logits(*args))[1]),
        mock.patch("torch.autograd.grad", labelled_grad),
    ):
        yield
