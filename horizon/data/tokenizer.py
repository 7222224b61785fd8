"""Tokenizers without a hub: one from a local folder, one trained on the text, or plain bytes.

All of them are transformers tokenizers, so they save into the model's folder and AutoTokenizer loads them back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from horizon.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
NUM_BYTE_TOKENS = 257  # 256 bytes and the end of text
# Merges stay inside a word: a contraction, letters, one digit, signs, line ends, or blanks. Qwen's own rule, because
# AutoTokenizer gives every tokenizer in a qwen2 folder that rule: a saved one must read text as it did in training.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SAMPLE_CHARS = 3_000_000  # more text changes the merges of a few thousand entries little and costs seconds
_CHUNK_CHARS = 1 << 16
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def given_tokenizer(
    choice: str, model_folder: Path | None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that `data.tokenizer` names; None when it has to be trained on the text.

    Raises:
        DataError: the folder does not exist or its tokenizer does not load.
    """
    if choice == "bytes":
        return byte_tokenizer()
    if choice == "train":
        return None
    if choice == "auto":
        if model_folder is None or not any((model_folder / name).is_file() for name in _FILES):
            return None
        folder = model_folder
    else:
        folder = Path(choice).expanduser()
        if not folder.is_dir():
            raise DataError(f"data.tokenizer={choice!r} is no folder; expected auto, train, bytes or a folder")
    return _load(folder, trust_remote_code)


def train_tokenizer(texts: Sequence[str], vocab_size: int, seed: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of at most `vocab_size` entries, trained on a seeded sample of `texts`.

    Raises:
        ConfigError: `vocab_size` cannot hold every byte.
    """
    from tokenizers import pre_tokenizers, trainers

    if vocab_size < NUM_BYTE_TOKENS:
        raise ConfigError(f"data.vocab_size={vocab_size} must be at least {NUM_BYTE_TOKENS}: the bytes and end of text")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = _byte_level({}, [])
    tokenizer.train_from_iterator(_sample(texts, seed), trainer)
    return _wrap(tokenizer)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, and the end of text."""
    from tokenizers import AddedToken, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = _byte_level({letter: index for index, letter in enumerate(alphabet)}, [])
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return _wrap(tokenizer)


def _load(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the library lets through whatever its parsers raise
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"tokenizer in {folder} does not load ({reason}); set data.tokenizer to another") from error
    return tokenizer


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    wrapped: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    return wrapped


def _sample(texts: Sequence[str], seed: int) -> Iterator[str]:
    """Chunks of the texts in seeded order, `_SAMPLE_CHARS` in all."""
    chunks = [(index, start) for index, text in enumerate(texts) for start in range(0, len(text), _CHUNK_CHARS)]
    left = _SAMPLE_CHARS
    for number in np.random.default_rng(seed).permutation(len(chunks)):
        index, start = chunks[number]
        chunk = texts[index][start : start + _CHUNK_CHARS]
        yield chunk[:left]
        left -= len(chunk)
        if left <= 0:
            return
