"""Loss, perplexity and accuracy from the scores of tokens, of all of them or of any part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from horizon.stream.head import TokenScores


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over trained tokens, which add up."""

    num_tokens: int = 0
    log_likelihood: float = 0.0  # natural logarithm, summed
    num_correct: int = 0  # tokens than which none was likelier

    def __add__(self, other: Tally) -> Tally:
        """Of both parts."""
        return Tally(
            self.num_tokens + other.num_tokens,
            self.log_likelihood + other.log_likelihood,
            self.num_correct + other.num_correct,
        )

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats a token; nan without any."""
        return -self.log_likelihood / self.num_tokens if self.num_tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the loss; inf where that is too large a number."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def accuracy(self) -> float:
        """Share of tokens that were predicted; nan without any."""
        return self.num_correct / self.num_tokens if self.num_tokens else math.nan


def tally_rows(scores: Sequence[TokenScores]) -> list[Tally]:
    """The tally of every row, in the order of the batches."""
    tallies = []
    for batch in scores:
        sums: list[Tensor] = [batch.trained.sum(1), batch.log_likelihoods.double().sum(1), batch.correct.sum(1)]
        tallies += [Tally(*numbers) for numbers in zip(*(column.tolist() for column in sums), strict=True)]
    return tallies


def total(tallies: Sequence[Tally]) -> Tally:
    """Of all of them."""
    return sum(tallies, Tally())


def by_source(tallies: Sequence[Tally], sources: Sequence[str]) -> dict[str, Tally]:
    """The tallies of the rows of each source, in the order in which sources first come; one source a row."""
    sums: dict[str, Tally] = {}
    for tally, source in zip(tallies, sources, strict=True):
        sums[source] = sums.get(source, Tally()) + tally
    return sums
