import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from horizon.config.schema import LrSchedule
from horizon.errors import ConfigError
from horizon.optim.schedule import learning_rate


def rates(schedule, warmup_steps, total_steps, min_lr_ratio=0.1, base_lr=1.0):
    return [
        learning_rate(step, base_lr, schedule, warmup_steps, total_steps, min_lr_ratio)
        for step in range(1, total_steps + 1)
    ]


def test_constant():
    assert rates(LrSchedule.constant, 4, 6) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_linear():
    assert rates(LrSchedule.linear, 2, 6) == pytest.approx([0.5, 1, 0.775, 0.55, 0.325, 0.1])


def test_cosine():
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert rates(LrSchedule.cosine, 0, 5) == pytest.approx([1, quarter, 0.55, 1.1 - quarter, 0.1])


@pytest.mark.parametrize("schedule", list(LrSchedule))
def test_without_warm_up_the_first_step_has_the_base_rate(schedule):
    assert rates(schedule, 0, 10, base_lr=3e-4)[0] == 3e-4
    assert rates(schedule, 0, 1, base_lr=3e-4) == [3e-4]


def test_after_the_last_step_the_rate_stays_at_its_end():
    assert learning_rate(50, 2.0, LrSchedule.cosine, 0, 10, 0.1) == pytest.approx(0.2)


@given(st.sampled_from(list(LrSchedule)), st.integers(0, 20), st.integers(1, 60), st.floats(0, 1))
def test_rises_to_the_base_rate_then_falls_to_the_end(schedule, warmup_steps, total_steps, ratio):
    values = rates(schedule, warmup_steps, total_steps, ratio, base_lr=2.0)
    peak = max(warmup_steps, 1) - 1
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    if peak < total_steps:
        assert values[peak] == 2.0
    if peak < total_steps - 1 and schedule is not LrSchedule.constant:
        assert values[-1] == pytest.approx(2.0 * ratio)


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps must be >= 0, got -1"):
        learning_rate(1, 1.0, LrSchedule.cosine, -1, 10, 0.1)
    with pytest.raises(ConfigError, match=r"optim\.min_lr_ratio must be in \[0, 1\], got 1.5"):
        learning_rate(1, 1.0, LrSchedule.cosine, 0, 10, 1.5)
