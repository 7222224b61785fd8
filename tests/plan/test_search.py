"""Which blocks go to HBM, by time: the candidates, and which of them is best."""

from dataclasses import replace

import pytest

from horizon.plan.activations import ActivationPlan
from horizon.plan.prediction import StepPrediction
from horizon.plan.search import AS_FAST, Arrangement, best, placements
from tests.plan.test_placement import TIED, UNTIED, needs


def arrangement(seconds, host_bytes, in_hbm=()):
    prediction = StepPrediction(num_tokens=1, arithmetic_s=seconds, link_s=0, optimizer_s=0, launch_s=0)
    activations = ActivationPlan(frozenset(), {}, ())
    return Arrangement(replace(needs(), in_hbm=frozenset(in_hbm)), activations, host_bytes, prediction)


def test_a_head_of_its_own_is_tried_last_and_right_after_the_embedding():
    assert placements(UNTIED) == [
        set(), {0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 3}, {0, 1, 3},
    ]  # fmt: skip
    assert placements(TIED) == [set(), {0}, {0, 3}, {0, 1, 3}, {0, 1, 2, 3}]


def test_the_fastest_wins_and_among_those_as_fast_the_one_with_the_least_on_the_host():
    slow, fast = arrangement(2.0, 0), arrangement(1.0, 100)
    as_fast = arrangement(1 + AS_FAST / 2, 50)
    assert best([slow, fast]) is fast
    assert best([slow, fast, as_fast]) is as_fast
    assert best([arrangement(1 + AS_FAST * 2, 50), fast]) is fast
    assert best([arrangement(1.001, 100), fast]) is fast  # no less on the host: time decides
    assert best([]) is None


@pytest.mark.parametrize("layouts", [TIED, UNTIED], ids=["tied", "untied"])
def test_no_candidate_has_a_head_in_hbm_without_what_it_borrows(layouts):
    head = len(layouts) - 1
    for in_hbm in placements(layouts):
        if head in in_hbm:
            assert {b.owner for b in layouts[head].borrowed} <= in_hbm
