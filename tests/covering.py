"""Few combinations of many options: breaks show where two options meet, seldom where it takes three of them."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(*, ids: Any = None, **options: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test with options so that every two values of two options meet in one of the tests at least."""
    values = [[*of_one] for of_one in options.values()]
    rows = few_rows([len(of_one) for of_one in values])
    chosen = [tuple(of_one[i] for of_one, i in zip(values, row, strict=True)) for row in rows]
    return pytest.mark.parametrize([*options], chosen, ids=ids)


def few_rows(sizes: list[int]) -> list[tuple[int, ...]]:
    """Of all rows of numbers below `sizes`, some that hold every pair: each time the first with the most new ones."""
    pairs = {row: {*combinations(enumerate(row), 2)} for row in product(*map(range, sizes))}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(pairs, key=lambda row: len(pairs[row] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen
