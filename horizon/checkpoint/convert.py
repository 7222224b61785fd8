"""Between checkpoints and Hugging Face folders, without an engine: one tensor in memory at a time."""

from __future__ import annotations

import re
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from horizon import __version__
from horizon.checkpoint.arrays import CHUNKS_IN_FLIGHT, ArrayWriter
from horizon.checkpoint.folder import PartialFolder
from horizon.checkpoint.format import BUFFER_KIND, DTYPE_NAMES, MASTER_KIND, ArraySpec
from horizon.checkpoint.hf_export import export_model
from horizon.checkpoint.hf_import import import_weights
from horizon.checkpoint.manifest import Manifest
from horizon.checkpoint.reader import Checkpoint
from horizon.checkpoint.restore import model_facts
from horizon.checkpoint.saves import TOKENIZER, commit, saved_buffers
from horizon.errors import CheckpointError
from horizon.models.adapters import attach
from horizon.models.skeleton import build_skeleton
from horizon.models.source import resolve_model
from horizon.units import GIB

_TOKENIZER_FILES = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|chat_template\.jinja|vocab\.(json|txt)|merges\.txt|.*\.model"
)


class TokenizerFiles:
    """A tokenizer as the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save_pretrained(self, save_directory: str, /) -> None:
        """Copy the files."""
        for path in sorted(self._folder.iterdir()):
            if path.is_file() and _TOKENIZER_FILES.fullmatch(path.name):
                shutil.copyfile(path, Path(save_directory) / path.name)


def saved_skeleton(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model that a checkpoint is of, without its weights.

    Raises:
        HorizonError: it cannot be built from its config alone.
    """
    skeleton = build_skeleton(checkpoint.manifest.model)
    if checkpoint.manifest.adapter is not None:
        attach(skeleton, checkpoint.manifest.adapter)
    checkpoint.fill_buffers(dict(skeleton.named_buffers()))
    if checkpoint.manifest.generation is not None:
        skeleton.generation_config = GenerationConfig.from_dict(checkpoint.manifest.generation)
    return skeleton


def export_checkpoint(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, max_shard_size: int = 4 * GIB) -> None:
    """Write a folder that transformers loads, from the masters; errors as `export_model`."""
    tokenizer = checkpoint.folder / TOKENIZER
    export_model(
        folder,
        saved_skeleton(checkpoint),
        checkpoint.read,
        dtype,
        tokenizer=TokenizerFiles(tokenizer) if tokenizer.is_dir() else None,
        max_shard_size=max_shard_size,
    )


def import_model(source: Path, target: Path) -> Manifest:
    """Write a checkpoint at step 0, without moments, from a Hugging Face folder.

    Raises:
        CheckpointError: the folder has no weights, they do not fit its config, or the target cannot be written.
        UnsupportedModelError: the architecture is unknown or needs code of its own.
    """
    found = resolve_model(str(source))
    if found.adapter is not None or not found.has_weights:
        what = "has no weights" if found.adapter is None else f"is an adapter of {found.folder}"
        raise CheckpointError(f"{source} {what}; expected a Hugging Face folder with safetensors")
    skeleton = build_skeleton(source)
    specs = {name: ArraySpec(name, MASTER_KIND, tuple(p.shape), "float32") for name, p in skeleton.named_parameters()}
    buffers = saved_buffers(skeleton)
    kept = {n: ArraySpec(n, BUFFER_KIND, tuple(b.shape), DTYPE_NAMES[b.dtype]) for n, b in buffers.items()}
    manifest = Manifest(
        horizon=__version__, time=time.time(), arrays=[*specs.values(), *kept.values()], **model_facts(skeleton)
    )
    partial = PartialFolder(target, manifest.num_bytes)
    writer, room = ArrayWriter(partial.path), threading.Semaphore(CHUNKS_IN_FLIGHT)

    def write(spec: ArraySpec, tensor: Tensor) -> None:
        for chunk in spec.chunks:
            room.acquire()  # a tensor's fp32 values do not pile up
            writer.write(spec, chunk, tensor[chunk.index].to("cpu", torch.float32).contiguous(), room.release)

    try:
        import_weights(source, skeleton, lambda name, tensor: write(specs[name], tensor.detach()))
        for name, buffer in saved_buffers(skeleton).items():
            for chunk in kept[name].chunks:
                writer.write(kept[name], chunk, buffer[chunk.index].contiguous(), lambda: None)
        writer.finish()
        commit(partial, manifest, TokenizerFiles(source))
    except BaseException as error:
        writer.give_up(CheckpointError(str(error)))
        with suppress(CheckpointError):
            writer.finish()
        partial.discard()
        raise
    return manifest
