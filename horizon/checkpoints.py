"""What an engine does with checkpoints: facts of the engine into a manifest, and a manifest's back into the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from horizon import __version__
from horizon.checkpoint.hf_export import export_model
from horizon.checkpoint.manifest import Manifest, read_manifest
from horizon.checkpoint.model_folder import Tokenizer
from horizon.checkpoint.reader import Checkpoint
from horizon.checkpoint.restore import (
    check_same,
    check_weights,
    clear_moments,
    model_facts,
    optimizer_facts,
    restore_moments,
    restore_weights,
)
from horizon.checkpoint.saves import Save
from horizon.config.schema import Moments
from horizon.errors import ConfigError, HorizonError
from horizon.models.skeleton import Unloaded
from horizon.optim.adamw import AdamW
from horizon.runtime import Runtime
from horizon.store.host import HostStore
from horizon.zo.runtime import ZerothOrderRuntime

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def of_adamw(runtime: Runtime | ZerothOrderRuntime, what: str) -> Runtime:
    """The runtime, or a HorizonError where it is of zeroth order: such a run is kept as its log."""
    if isinstance(runtime, ZerothOrderRuntime):
        raise HorizonError(f"{what}: a zeroth-order run is kept as its log, of kilobytes; use log_steps and replay")
    return runtime


def begin_save(
    runtime: Runtime | ZerothOrderRuntime,
    folder: str | Path,
    passes: int,
    seed: int,
    run: dict[str, Any],
    tokenizer: Tokenizer | None,
) -> Save:
    """Begin to save what the runtime holds; see `horizon.checkpoint.saves`."""
    runtime = of_adamw(runtime, "save_checkpoint")
    manifest = Manifest(
        horizon=__version__,
        time=time.time(),
        step=runtime.version,
        passes=passes,
        seed=seed,
        last_norm=runtime.last_norm,
        optimizer=optimizer_facts(runtime.optimizer),
        frozen=[p.name for layout in runtime.model.layouts for p in layout.params if not p.spec.trainable],
        run=run,
        **model_facts(runtime.model.skeleton),
    )
    return runtime.begin_save(Path(folder), manifest, tokenizer)


class Restorable(Protocol):
    """An engine, as far as it is known here."""

    def restore(self, folder: str | Path, *, weights_only: bool = False) -> dict[str, Any]:
        """Go on from a checkpoint."""

    def close(self) -> None:
        """Release all memory."""


E = TypeVar("E", bound=Restorable)


def load(build: Callable[..., E], folder: str | Path, model: Any, weights_only: bool, settings: dict[str, Any]) -> E:
    """An engine that `build` makes without weights, and that goes on from a checkpoint."""
    manifest = read_manifest(Path(folder))
    defaults = {"optimizer": saved_optimizer(manifest), "seed": manifest.seed}
    source = Unloaded(manifest.model if model is None else model, manifest.adapter)
    engine = build(source, **{**defaults, **settings})
    try:
        engine.restore(folder, weights_only=weights_only)
    except BaseException:
        engine.close()
        raise
    return engine


def restore(runtime: Runtime | ZerothOrderRuntime, folder: str | Path, weights_only: bool) -> Manifest:
    """Exchange the runtime's states for those of a checkpoint.

    Returns:
        the checkpoint's manifest; where its weights alone were taken, with the numbers of a run that begins.

    Raises:
        CheckpointError: it is damaged, or (before anything is exchanged) of another model or optimizer.
    """
    runtime = of_adamw(runtime, "restore")
    checkpoint, layouts = Checkpoint(folder), runtime.store.layouts
    manifest, skeleton = checkpoint.manifest, runtime.model.skeleton
    whole = manifest.optimizer is not None and not weights_only
    if whole:
        check_same(checkpoint, layouts, skeleton, runtime.optimizer)
    check_weights(checkpoint, {p.name: p.spec.shape for lay in layouts for p in lay.params})

    def fill(store: HostStore) -> None:
        restore_weights(checkpoint, store)
        checkpoint.fill_buffers(dict(skeleton.named_buffers()))
        if whole:
            restore_moments(checkpoint, store, Moments(runtime.optimizer.moments), manifest.seed)
        else:
            clear_moments(store)

    if whole:
        runtime.restore(fill, manifest.step, manifest.last_norm)
        return manifest
    runtime.restore(fill, 0, None)
    return Manifest(
        horizon=manifest.horizon, time=manifest.time, model=manifest.model, model_class=manifest.model_class
    )


def saved_optimizer(manifest: Manifest) -> AdamW:
    """AdamW with the settings of a checkpoint, as far as it has any."""
    saved = manifest.optimizer
    if saved is None:
        return AdamW()
    betas = saved["beta1"], saved["beta2"]
    formats = {"moments": saved["moments"], "master": saved["master"]}
    return AdamW(betas=betas, eps=saved["eps"], weight_decay=saved["weight_decay"], **formats)


def export(runtime: Runtime | ZerothOrderRuntime, folder: str | Path, dtype: str, tokenizer: Tokenizer | None) -> None:
    """Write a Hugging Face folder from the masters, tensor by tensor."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")
    runtime.wait_for_updates()
    export_model(folder, runtime.model.skeleton, runtime.store.read_master, DTYPES[dtype], tokenizer=tokenizer)
