"""Which blocks go to HBM, by time: the candidates, and which of them is best."""

from dataclasses import replace

import pytest

from horizon.plan.activations import ActivationPlan
from horizon.plan.search import AS_FAST, Arrangement, best, placements, sample, search
from tests.plan.test_placement import TIED, UNTIED, needs


def arrangement(seconds, host_bytes, in_hbm=(), least=None):
    activations = ActivationPlan(frozenset(), {}, ())
    placed = replace(needs(), in_hbm=frozenset(in_hbm))
    return Arrangement(placed, activations, host_bytes, seconds if least is None else least, lambda: seconds)


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


def test_what_takes_longer_at_the_least_is_not_timed():
    def never():
        raise AssertionError("timed in vain")

    fast, near = arrangement(1.0, 100, least=0.5), arrangement(1.001, 50, least=1.0)
    hopeless = arrangement(9.0, 0, least=1 + AS_FAST * 2)._replace(seconds=never)
    assert best([hopeless, near, fast]) is near


@pytest.mark.parametrize("layouts", [TIED, UNTIED], ids=["tied", "untied"])
def test_no_candidate_has_a_head_in_hbm_without_what_it_borrows(layouts):
    head = len(layouts) - 1
    for in_hbm in placements(layouts):
        if head in in_hbm:
            assert {b.owner for b in layouts[head].borrowed} <= in_hbm


@pytest.mark.parametrize("num", [1, 7, 12, 30, 200])
def test_between_two_samples_every_option_is_looked_at(num):
    first = list(sample(num))
    assert first[0] == 0 and len(first) <= 24
    assert {i for near in first for i in sample(num, near)} == set(range(num))


def test_the_best_pair_of_placement_and_turn_is_found_without_trying_all():
    """Seconds fall with both, up to what fits: no more than 60 of the one and the double of the other."""
    placed, tried = [frozenset(range(num)) for num in range(60)], []

    def arrange(in_hbm, turn_layers):
        tried.append((len(in_hbm), turn_layers))
        if len(in_hbm) + 2 * turn_layers > 60:
            return None
        found = arrangement(1000 - len(in_hbm) - 3 * turn_layers, 0, in_hbm)
        return found._replace(needs=replace(found.needs, turn_layers=turn_layers))

    chosen = search(placed, range(29), arrange)
    assert (len(chosen.needs.in_hbm), chosen.needs.turn_layers) == (4, 28)
    assert len(tried) < 60 * 29 / 5
    assert search(placed, [40], arrange) is None


def test_layers_at_the_turn_never_cost_host_memory():
    def arrange(in_hbm, turn_layers):
        found = arrangement(10 - turn_layers, 100 + (50 if turn_layers > 1 else 0) - len(in_hbm), in_hbm)
        return found._replace(needs=replace(found.needs, turn_layers=turn_layers))

    chosen = search([frozenset(), frozenset({0})], range(5), arrange)
    assert (chosen.needs.in_hbm, chosen.needs.turn_layers) == ({0}, 1)
