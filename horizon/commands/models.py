"""The model that a command uses: a Hugging Face folder or hub id, a checkpoint, or the last one of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horizon.checkpoint.format import MANIFEST
from horizon.checkpoint.manifest import read_manifest
from horizon.checkpoint.saves import TOKENIZER
from horizon.config.schema import HorizonConfig
from horizon.data.tokenizer import given_tokenizer
from horizon.errors import ConfigError
from horizon.inference import InferenceEngine
from horizon.models.hf_config import load_config
from horizon.models.source import ModelSource, resolve_model
from horizon.run_checkpoints import FOLDER, find_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class UsedModel:
    """Where a model and its tokenizer are."""

    source: Path | ModelSource  # a checkpoint's folder, or a model's

    @property
    def folder(self) -> Path:
        """What was named."""
        return self.source if isinstance(self.source, Path) else self.source.named

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer is, if it has one."""
        return self.source / TOKENIZER if isinstance(self.source, Path) else self.source.tokenizer_folder

    def vocab_size(self, config: HorizonConfig) -> int:
        """Tokens that the model knows."""
        source = self.source
        described = read_manifest(source).model if isinstance(source, Path) else source.folder
        size: int = load_config(described, config.model.trust_remote_code).get_text_config().vocab_size
        return size

    def tokenizer(self, config: HorizonConfig) -> PreTrainedTokenizerBase:
        """The model's tokenizer, or the one that data.tokenizer names.

        Raises:
            ConfigError: there is none.
        """
        trust = config.model.trust_remote_code
        found = given_tokenizer(config.data.tokenizer, self.tokenizer_folder, trust_remote_code=trust)
        if found is None:
            raise ConfigError(f"{self.folder} has no tokenizer; set data.tokenizer to the folder of one, or to bytes")
        return found

    def open(self, config: HorizonConfig) -> InferenceEngine:
        """The model, weights loaded; errors as `InferenceEngine`."""
        settings: dict[str, Any] = {
            "memory": config.memory,
            "device": config.device,
            "compute_dtype": config.compute_dtype,
            "kernels": config.kernels,
            "seed": config.seed,
            "trust_remote_code": config.model.trust_remote_code,
            "self_check": config.model.self_check,
        }
        if isinstance(self.source, Path):
            return InferenceEngine.load_checkpoint(self.folder, **settings)
        return InferenceEngine.from_pretrained(self.folder, **settings)


def find_model(config: HorizonConfig) -> UsedModel:
    """What `model.path` means.

    Raises:
        ConfigError: it is not set.
        CheckpointError: it holds neither weights nor a checkpoint.
    """
    model = config.model
    if model.path is None:
        raise ConfigError(
            "no model: set model.path to a Hugging Face folder, a hub id, a checkpoint, or a run's folder"
        )
    folder = Path(model.path).expanduser()
    if (folder / MANIFEST).is_file() or (folder / FOLDER).is_dir():
        return UsedModel(find_checkpoint(folder, "model.path="))
    return UsedModel(resolve_model(model.path, model.revision, model.trust_remote_code))


def split_arguments(arguments: list[str], keys: set[str]) -> tuple[dict[str, str], list[str]]:
    """The `key=value` arguments of these keys, and all others; flags are left where they are."""
    own = {key: value for key, sep, value in (a.partition("=") for a in arguments) if sep and key in keys}
    return own, [a for a in arguments if a.partition("=")[0] not in own]


def refuse_flags(arguments: list[str], command: str) -> None:
    """Raise a ConfigError where there is a flag other than --json."""
    flags = {argument for argument in arguments if argument.startswith("-")} - {"--json"}
    if flags:
        raise ConfigError(f"horizon {command} has no flag {min(flags)}; expected --json (horizon {command} --help)")
