"""Questions answered by a model: choices by their likelihood, texts by going on greedily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from horizon.data.rows import IGNORED
from horizon.errors import DataError
from horizon.eval.metrics import Tally, tally_rows
from horizon.eval.questions import Choice, Exact
from horizon.generation.prompts import end_ids, new_texts, pad_left, padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from horizon.inference import InferenceEngine


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many rows go through a model at once."""

    micro_batch_tokens: int = 8192  # through one block
    pass_tokens: int = 65536  # through all blocks, whose weights cross the link once
    prompts: int = 32  # that are gone on with together


@dataclass(frozen=True, slots=True)
class ChoiceResult:
    """How a question was answered."""

    log_likelihoods: tuple[float, ...]  # of each choice, summed over its tokens
    by_sum: int  # the choice with the largest
    by_byte: int  # the choice with the largest a byte of its text
    answer: int


def score_rows(engine: InferenceEngine, batches: Iterator[dict[str, Tensor]], sizes: Sizes) -> list[Tally]:
    """The tally of every row, in as few passes as `sizes` allows."""
    tallies: list[Tally] = []
    for some in _passes(batches, sizes.pass_tokens):
        tallies += tally_rows(engine.score(some))
    return tallies


def _passes(batches: Iterator[dict[str, Tensor]], pass_tokens: int) -> Iterator[list[dict[str, Tensor]]]:
    waiting: list[dict[str, Tensor]] = []
    num_tokens = 0
    for batch in batches:
        size = batch["input_ids"].numel()
        if waiting and num_tokens + size > pass_tokens:
            yield waiting
            waiting, num_tokens = [], 0
        waiting.append(batch)
        num_tokens += size
    if waiting:
        yield waiting


def answer_choices(
    engine: InferenceEngine, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Choice], sizes: Sizes
) -> list[ChoiceResult]:
    """Score every choice as what follows its prompt.

    The tokens that count are those by which prompt and choice together differ from the prompt alone.

    Raises:
        DataError: a row has more tokens than the model has positions.
    """
    rows = [_labelled(tokenizer, q, text, engine.max_positions) for q in questions for text in q.choices]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # like lengths together: less padding
    tallies = score_rows(engine, _padded([rows[i] for i in order], sizes.micro_batch_tokens), sizes)
    found = iter([tally for _, tally in sorted(zip(order, tallies, strict=True), key=lambda pair: pair[0])])
    return [_result(q, [tally.log_likelihood for tally in islice(found, len(q.choices))]) for q in questions]


def _result(question: Choice, likelihoods: list[float]) -> ChoiceResult:
    numbers = range(len(likelihoods))
    a_byte = [likelihoods[i] / len(question.choices[i].encode()) for i in numbers]
    return ChoiceResult(
        tuple(likelihoods), max(numbers, key=lambda i: likelihoods[i]), max(numbers, key=lambda i: a_byte[i]),
        question.answer,
    )  # fmt: skip


def _labelled(
    tokenizer: PreTrainedTokenizerBase, question: Choice, choice: str, limit: int | None
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt with a choice, and their labels."""
    alone, ids = question.prompt.encode(tokenizer), question.prompt.encode(tokenizer, choice)
    if limit is not None and len(ids) > limit:
        raise DataError(f"a prompt with a choice has {len(ids)} tokens, but the model has {limit} positions")
    shared = next((i for i, (a, b) in enumerate(zip(alone, ids, strict=False)) if a != b), min(len(alone), len(ids)))
    shared = max(1, min(shared, len(ids) - 1))  # the first token follows nothing, and something is scored
    return ids, [IGNORED] * shared + ids[shared:]


def _padded(rows: Sequence[tuple[list[int], list[int]]], num_tokens: int) -> Iterator[dict[str, Tensor]]:
    """Rows in batches of at most so many tokens, one row at least; they come by length."""
    start = 0
    while start < len(rows):
        stop = start + 1
        while stop < len(rows) and (stop + 1 - start) * len(rows[stop][0]) <= num_tokens:
            stop += 1
        longest = len(rows[stop - 1][0])
        padded = [
            (ids + [0] * (longest - len(ids)), labels + [IGNORED] * (longest - len(ids)), len(ids))
            for ids, labels in rows[start:stop]
        ]
        real = torch.arange(longest) < torch.tensor([size for _, _, size in padded])[:, None]
        yield {
            "input_ids": torch.tensor([ids for ids, _, _ in padded]),
            "labels": torch.tensor([labels for _, labels, _ in padded]),
            "attention_mask": real.long(),
        }
        start = stop


def answer_exactly(
    engine: InferenceEngine,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Exact],
    sizes: Sizes,
    *,
    max_new_tokens: int,
    stop: str,
) -> list[str]:
    """What the model writes after each prompt, greedily, up to `stop` (empty: to its end), blanks around it removed."""
    prompts = [question.prompt.encode(tokenizer) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    ends = end_ids(tokenizer, engine.generation_config)
    stopping: dict[str, Any] = {"stop_strings": [stop], "tokenizer": tokenizer} if stop else {}
    texts = [""] * len(prompts)
    for start in range(0, len(order), sizes.prompts):
        some = order[start : start + sizes.prompts]
        ids, mask = pad_left([prompts[i] for i in some], padding_id(tokenizer))
        sequences = engine.generate(
            ids, mask, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends or None,
            pad_token_id=padding_id(tokenizer), **stopping,
        )  # fmt: skip
        for i, (text, _) in zip(some, new_texts(tokenizer, sequences, ids.shape[1], ends), strict=True):
            texts[i] = (text.partition(stop)[0] if stop else text).strip()
    return texts


def is_right(question: Exact, text: str) -> bool:
    """Whether a text is one of the answers, blanks around them aside."""
    return text in {answer.strip() for answer in question.answers}
