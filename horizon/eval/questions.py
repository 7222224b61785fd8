"""Questions with known answers, from a local JSONL file; the format stands in docs/generation-and-evaluation.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from horizon.errors import DataError
from horizon.generation.prompts import Prompt, prompt_of, read_json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = {"prompt", "messages", "choices", "answer"}


@dataclass(frozen=True, slots=True)
class Choice:
    """Which of some texts follows the prompt?"""

    prompt: Prompt
    choices: tuple[str, ...]
    answer: int  # number of the right one, from 0


@dataclass(frozen=True, slots=True)
class Exact:
    """What text follows the prompt?"""

    prompt: Prompt
    answers: tuple[str, ...]  # any of them is right


def read_questions(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Choice | Exact]:
    """All questions of a file, in order.

    Raises:
        DataError: a line is no question, or there is none; names file, line and field.
    """
    questions = [_question(record, where, tokenizer) for where, record in read_json_lines(path)]
    if not questions:
        raise DataError(f"{path} holds no question")
    return questions


def _question(record: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> Choice | Exact:
    if unknown := sorted(record.keys() - FIELDS):
        raise DataError(f"{where}: {unknown[0]!r} is no field of a question; expected {', '.join(sorted(FIELDS))}")
    prompt, answer = prompt_of(record, where, tokenizer), record.get("answer")
    if "choices" not in record:
        answers: list[Any] = answer if isinstance(answer, list) else [answer]
        if not answers or not all(isinstance(text, str) and text.strip() for text in answers):
            raise DataError(
                f"{where}: 'answer' is {answer!r}, expected a text, or a list of texts any of which is right"
            )
        return Exact(prompt, tuple(answers))
    choices = record["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise DataError(f"{where}: 'choices' is {choices!r}, expected a list of two texts or more")
    return Choice(prompt, tuple(choices), _number(answer, choices, where))


def _number(answer: Any, choices: list[str], where: str) -> int:
    """Which choice an answer means: its number, or its text."""
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise DataError(
        f"{where}: 'answer' is {answer!r}, expected one of the choices or its number, 0 to {len(choices) - 1}"
    )
