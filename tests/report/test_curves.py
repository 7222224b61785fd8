import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from horizon.report.curves import MOST_POINTS, SMOOTHED_FROM, smoothed, thinned, window

VALUES = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=300)


@given(VALUES, st.integers(4, 60))
def test_a_thinned_curve_has_points_that_were_measured_with_both_ends_and_both_extremes(values, most):
    x = [float(i) for i in range(len(values))]
    xs, ys = thinned(x, values, most)
    assert len(xs) == len(ys) <= max(most, 2)
    assert xs == sorted(set(xs)) and (xs[0], xs[-1]) == (x[0], x[-1])
    np.testing.assert_array_equal(ys, [values[int(at)] for at in xs])
    known = [value for value in values if not math.isnan(value)]
    if known:
        assert {min(known), max(known)} <= set(ys)


def test_a_curve_that_is_short_enough_is_left_alone():
    assert thinned([1, 2], [3.0, math.nan])[0] == [1, 2]
    assert len(thinned(range(MOST_POINTS), [1.0] * MOST_POINTS)[0]) == MOST_POINTS


@given(VALUES, st.integers(1, 40))
def test_a_smoothed_value_is_the_mean_of_the_finite_ones_around_it(values, over):
    found = smoothed(values, over)
    assert len(found) == len(values)
    for i, value in enumerate(found):
        start = i - (over - (over - 1) // 2 - 1)
        around = [v for v in values[max(0, start) : max(0, start + over)] if not math.isnan(v)]
        assert (math.isnan(value) and not around) or value == pytest.approx(np.mean(around), rel=1e-6, abs=1e-4)


def test_only_long_runs_are_smoothed():
    assert window(SMOOTHED_FROM - 1) == 1
    assert (window(SMOOTHED_FROM), window(20_000)) == (2, 400)
