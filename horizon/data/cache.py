"""Tokens kept between runs, in a folder named after everything that they depend on.

    HASH/                 whole: it was renamed when all of it was on disk
        ids.npy, lengths.npy, trained.npy (missing: all are trained), about.json
    HASH.partial/         being written by whoever holds the lock
    HASH.lock             held while tokens are made: a second run waits, then reads what the first has made

The hash covers the files' contents, the tokenizer, and the settings that say what is made of them. Entries are mapped
into memory, not read, and may be deleted at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from horizon.data.encoding import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger(__name__)
_VERSION = 1  # of what is made of the same input
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The tokens of a source, and what was left out on the way."""

    tokens: Tokens
    num_skipped: int = 0
    first_skipped: str = ""  # the message about it
    reused: bool = False  # from an earlier run


def cache_folder(setting: str | None) -> Path | None:
    """The folder that `data.cache` names; None: nothing is kept."""
    if setting is None:
        return None
    if setting != "auto":
        return Path(setting).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "horizon" / "tokens"


def content_hash(files: Iterable[Path]) -> str:
    """Of what the files hold, in this order."""
    digest = hashlib.blake2b(digest_size=20)
    for path in files:
        size = 0
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
        except OSError:  # who reads it says so
            size = -1
        digest.update(f"\0{size}\0".encode())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Of all that decides which tokens a text gets; None: it is a tokenizer in Python, and nothing says so."""
    if not tokenizer.is_fast:
        return None
    import tokenizers

    backend: Any = tokenizer.backend_tokenizer
    parts = [tokenizers.__version__, backend.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=20).hexdigest()


class TokenCache:
    """Entries below `folder`; without a folder, or where it cannot be written, nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, facts: dict[str, Any], make: Callable[[], Tokenized]) -> Tokenized:
        """What `make` gives, from an earlier run if one has made it.

        Args:
            facts: what it depends on. A None among them is something unknown, and then nothing is kept.
        """
        if self._folder is None or None in facts.values():
            return make()
        text = json.dumps({"version": _VERSION, **facts}, sort_keys=True, default=str)
        entry = self._folder / hashlib.blake2b(text.encode(), digest_size=20).hexdigest()
        with ExitStack() as held:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(_locked(entry.with_suffix(".lock")))
            except OSError as error:
                _LOG.warning("data.cache=%s cannot be used (%s); nothing is kept", self._folder, error.strerror)
                return make()
            if entry.is_dir() and (found := _read(entry)) is not None:
                return found
            made = make()
            try:
                _write(entry, made)
            except OSError as error:
                _LOG.warning("data.cache=%s cannot be written (%s); nothing is kept", self._folder, error.strerror)
                return made
            kept = _read(entry)  # mapped, so that the copy in memory can go
        return made if kept is None else replace(kept, reused=False)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(entry: Path) -> Tokenized | None:
    """The entry, or None (and it is gone) if it is damaged."""
    try:
        about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
        ids, lengths = _map(entry / "ids.npy"), _map(entry / "lengths.npy")
        file = entry / "trained.npy"
        trained = _map(file) if file.exists() else np.broadcast_to(np.True_, len(ids))
        if not len(ids) == len(trained) == lengths.sum() or len(lengths) != len(about["where"]):
            raise ValueError("its parts do not fit together")
        tokens = Tokens(ids, trained, np.array(lengths), about["where"])
        return Tokenized(tokens, about["num_skipped"], about["first_skipped"], reused=True)
    except (OSError, ValueError, KeyError, EOFError) as error:
        _LOG.warning("data.cache: %s is damaged (%s) and is made again", entry, error)
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _map(file: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    return array


def _write(entry: Path, made: Tokenized) -> None:
    partial, tokens = entry.with_suffix(".partial"), made.tokens
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir()
    arrays = {"ids": tokens.ids, "lengths": tokens.lengths}
    if not tokens.trained.all():
        arrays["trained"] = tokens.trained
    for name, array in arrays.items():
        with (partial / f"{name}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
            _flush(file)
    about = {"num_skipped": made.num_skipped, "first_skipped": made.first_skipped, "where": list(tokens.where)}
    with (partial / "about.json").open("wb") as file:
        file.write(json.dumps(about).encode())
        _flush(file)
    os.rename(partial, entry)


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
