from itertools import combinations, product

import pytest

from tests.covering import few_rows, pairwise


@pytest.mark.parametrize(("sizes", "most"), [([4, 3], 12), ([2, 2, 2], 4), ([4, 3, 3, 2, 2], 14), ([5, 2, 2, 2], 11)])
def test_every_pair_of_values_meets_in_few_rows(sizes, most):
    rows = few_rows(sizes)
    assert len(rows) <= most < 1 + len([*product(*map(range, sizes))])
    for one, other in combinations(range(len(sizes)), 2):
        assert {(row[one], row[other]) for row in rows} == {*product(range(sizes[one]), range(sizes[other]))}


def test_a_test_gets_the_values_by_name():
    mark = pairwise(tied=[False, True], clip=["exact"], ids=str).mark
    assert mark.args == (["tied", "clip"], [(False, "exact"), (True, "exact")])
