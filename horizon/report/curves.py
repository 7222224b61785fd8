"""Curves of many steps, made fit to be drawn: smoothed, and thinned out to points that were measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MOST_POINTS = 800  # of a curve that is drawn; a picture has fewer columns of pixels
SMOOTHED_FROM = 100  # steps; below, every step can be seen
SMOOTHED_OVER = 0.02  # of all steps


def window(num_steps: int) -> int:
    """Steps that a smoothed curve is the mean of."""
    return max(1, round(SMOOTHED_OVER * num_steps)) if num_steps >= SMOOTHED_FROM else 1


def thinned(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """At most `most` of the points, in order: the first, the last, and lowest and highest of equally many each."""
    if len(x) <= most:
        return list(x), list(y)
    values = np.asarray(y, dtype=np.float64)
    kept = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), (most - 2) // 2):
        known = part[np.isfinite(values[part])]
        if len(known):
            kept |= {int(known[np.argmin(values[known])]), int(known[np.argmax(values[known])])}
    order = sorted(kept)
    return [x[i] for i in order], [y[i] for i in order]


def smoothed(y: Sequence[float], over: int) -> list[float]:
    """For each value the mean of the finite ones among the `over` around it (fewer at the ends); NaN without any."""
    values = np.asarray(y, dtype=np.float64)
    known = np.isfinite(values)
    kernel = np.ones(over)
    sums: NDArray[np.float64] = _same(np.where(known, values, 0.0), kernel)
    counts: NDArray[np.float64] = _same(known.astype(np.float64), kernel)
    return [s / c if c > 0.5 else math.nan for s, c in zip(sums.tolist(), counts.tolist(), strict=True)]


def _same(values: NDArray[np.float64], kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    """The convolution, as long as `values` also where the kernel is longer."""
    start = (len(kernel) - 1) // 2
    return np.convolve(values, kernel)[start : start + len(values)]
