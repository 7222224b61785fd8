"""Held-out rows: what their scores come to, when they are scored, and when a run has stopped getting better."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from horizon.config.schema import CheckpointConfig, EvalConfig, HorizonConfig, ModelConfig, TooLong
from horizon.data.encoding import Tokens
from horizon.data.pieces import cut
from horizon.data.rows import Source, pad
from horizon.errors import ConfigError, DataError
from horizon.eval.metrics import Tally
from horizon.run_settings import check_settings
from horizon.stream.head import TokenScores
from horizon.validation import (
    Evaluation,
    HeldOut,
    Patience,
    check_eval_settings,
    check_held_out,
    describe_eval,
    score_of,
)


def rows(num, sources=None):
    """Rows that tell their number by their tokens."""
    tokens = Tokens(np.repeat(np.arange(num, dtype=np.int32), 4), np.ones(4 * num, bool), np.full(num, 4), [""] * num)
    found = pad(Source("", tokens), cut(tokens, np.ones(num, bool), 4, TooLong.split), 4, pad_id=0)
    if sources is None:
        return found
    names = sorted(set(sources))
    order = np.array([names.index(name) for name in sources])
    return dataclasses.replace(found, sources=tuple(Source(name, tokens) for name in names), source=order)


class Scorer:
    """An engine to which row r has the loss r for each of its r + 1 labels, of which one is predicted."""

    def __init__(self):
        self.asked = []

    def score(self, batches):
        self.asked.append([batch["input_ids"][:, 0].tolist() for batch in batches])
        return [self.scores_of(batch["input_ids"][:, 0]) for batch in batches]

    def scores_of(self, numbers):
        trained = torch.arange(10) <= numbers[:, None]
        return TokenScores(-numbers[:, None].float() * trained, trained & (torch.arange(10) == 0), trained)


def evaluation(tmp_path, held_out, engine=None, kept=0, tell=lambda row: None, **settings):
    return Evaluation(EvalConfig(**settings), engine or Scorer(), held_out, tmp_path, kept, tell)


def written(tmp_path):
    return [json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines()]


def test_rows_go_through_the_model_a_step_at_a_time_in_micro_batches():
    held_out = HeldOut.of(rows(9), num_rows=7, rows_at_once=4, micro_batch=3)
    found = [[batch["input_ids"][:, 0].tolist() for batch in batches] for batches in held_out.passes]
    assert found == [[[0, 1, 2], [3]], [[4, 5, 6]]]
    assert HeldOut.of(None, 4, 4, 3) == HeldOut((), ())
    assert HeldOut.of(rows(3), 0, 4, 3).passes == ()


def test_every_label_counts_the_same_in_all_and_by_source(tmp_path):
    names, heard = ["prose", "code", "prose", "code", "prose"], []
    held_out = HeldOut.of(rows(5, names), num_rows=4, rows_at_once=3, micro_batch=2)
    with evaluation(tmp_path, held_out, tell=heard.append) as found:
        row = found.at(7)
    assert row.loss == pytest.approx((0 * 1 + 1 * 2 + 2 * 3 + 3 * 4) / 10)
    assert (row.step, row.num_rows, row.num_tokens, row.accuracy) == (7, 4, 10, 0.4)
    assert row.perplexity == pytest.approx(math.exp(2.0))
    assert list(row.sources) == ["code", "prose"]
    code, prose = row.sources["code"], row.sources["prose"]
    assert (code.loss, code.num_tokens, code.num_rows, code.accuracy) == (
        pytest.approx(14 / 6),
        6,
        2,
        pytest.approx(1 / 3),
    )
    assert (prose.loss, prose.num_tokens, prose.num_rows, prose.accuracy) == (pytest.approx(1.5), 4, 2, 0.5)
    assert heard == [row] and written(tmp_path) == [dataclasses.asdict(row)]
    assert describe_eval(row) == "2.0000 (perplexity 7.389, accuracy 40.0%); code 2.3333, prose 1.5000"


@pytest.mark.parametrize("names", [None, ["only"] * 3])
def test_one_source_is_not_told_apart(tmp_path, names):
    with evaluation(tmp_path, HeldOut.of(rows(3, names), 3, 3, 3)) as found:
        assert found.at(0).sources == {}


def test_a_step_is_scored_once_and_a_row_written_once(tmp_path):
    engine, held_out = Scorer(), HeldOut.of(rows(2), 2, 2, 2)
    with evaluation(tmp_path, held_out, engine) as found:
        assert found.at(0) is found.at(0)
        found.at(3)
    assert len(engine.asked) == 2
    with evaluation(tmp_path, held_out, engine, kept=3) as found:  # as a resumed run that has no step left
        found.at(3)
        found.at(5)
    assert [row["step"] for row in written(tmp_path)] == [0, 3, 5]
    with evaluation(tmp_path, held_out, engine, kept=4) as found:
        pass
    assert [row["step"] for row in written(tmp_path)] == [0, 3]
    with evaluation(tmp_path, held_out, engine) as found:
        assert written(tmp_path) == []


def test_without_rows_there_is_nothing(tmp_path):
    with evaluation(tmp_path, HeldOut((), ())) as found:
        assert found.at(0) is None
    assert written(tmp_path) == []


@pytest.mark.parametrize(("every", "due"), [(None, []), ("3", [3, 6, 9]), ("25tokens", [3, 5, 8, 10]), ("1h", [])])
def test_it_is_due_when_eval_every_says_so(tmp_path, every, due):
    with evaluation(tmp_path, HeldOut.of(rows(2), 2, 2, 2), every=every) as found:
        found.begin(0, 0)
        seen = []
        for step in range(1, 11):
            if found.is_due(step, 10 * step):
                found.when_due(step, 10 * step)
                seen.append(step)
    assert seen == due


def test_a_resumed_run_scores_where_it_would_have(tmp_path):
    with evaluation(tmp_path, HeldOut.of(rows(2), 2, 2, 2), every="4") as found:
        found.begin(6, 60)
        assert [step for step in range(7, 10) if found.is_due(step, 10 * step)] == [8, 9]


# ---- patience


def test_patience_counts_what_is_not_better_than_the_best_by_min_delta():
    patience, misses = Patience(limit=2, min_delta=0.5), []
    for step, loss in enumerate([5.0, 4.8, 4.2, 3.9, math.nan, 3.0]):
        patience.see(step, loss)
        misses.append((patience.misses, patience.verdict is not None))
    # 4.2 is better than 4.8, the best so far, by more than 0.5; 3.9 is not, by 0.3
    assert misses == [(0, False), (1, False), (0, False), (1, False), (2, True), (0, False)]
    assert (patience.best_loss, patience.best_step) == (3.0, 5)


def test_small_steps_downhill_add_up():
    patience, misses = Patience(limit=9, min_delta=0.5), []
    for step, loss in enumerate([5.0, 4.7, 4.4, 4.1, 3.8]):
        patience.see(step, loss)
        misses.append(patience.misses)
    assert misses == [0, 1, 0, 1, 0]
    again = Patience(limit=9, min_delta=0.5)
    again.restore(json.loads(json.dumps(patience.state)))
    assert again == patience


def test_patience_says_why_and_what_was_best():
    patience = Patience(limit=2, min_delta=0.1)
    for step, loss in [(0, 3.0), (10, 2.0), (20, 1.95), (30, 1.9)]:
        patience.see(step, loss)
    assert patience.verdict == (
        "none of the last 2 evaluations was better than the best before them by more than eval.min_delta=0.1 "
        "(eval.patience=2); the best loss was 1.9000 at step 30"
    )


LOSSES = st.lists(st.one_of(st.floats(0, 20), st.just(math.nan), st.just(math.inf)), max_size=12)


@given(LOSSES, st.integers(0, 12), st.integers(1, 4), st.sampled_from([0.0, 0.25]))
def test_patience_goes_on_from_its_state_as_json(losses, cut, limit, min_delta):
    whole, first = Patience(limit, min_delta), Patience(limit, min_delta)
    for step, loss in enumerate(losses):
        whole.see(step, loss)
        if step < cut:
            first.see(step, loss)
    second = Patience(limit, min_delta)
    second.restore(json.loads(json.dumps(first.state, allow_nan=False)))
    for step, loss in list(enumerate(losses))[cut:]:
        second.see(step, loss)
    assert (second, second.verdict) == (whole, whole.verdict)


def test_without_a_limit_there_is_no_end():
    patience = Patience(None, 0.0)
    for step in range(100):
        patience.see(step, 1.0)
    assert patience.misses == 99 and patience.verdict is None


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": -1}, r"eval\.rows=-1 must be at least 0"),
        ({"every": "often"}, r"eval\.every='often': expected steps such as 100"),
        ({"every": "10", "rows": 0}, r"eval\.every=10 has nothing to score: set eval\.rows above 0"),
        ({"patience": 0, "every": "10"}, r"eval\.patience=0 must be at least 1"),
        ({"patience": 3}, r"eval\.patience=3 counts evaluations while it trains: set eval\.every"),
        ({"min_delta": -1.0}, r"eval\.min_delta=-1\.0 must be a number of at least 0"),
        ({"min_delta": math.nan}, r"eval\.min_delta=nan must be"),
        ({"min_delta": 0.1}, r"eval\.min_delta=0\.1 has no use without eval\.patience"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    config = HorizonConfig(eval=EvalConfig(**settings), model=ModelConfig(config={"model_type": "llama"}))
    for check in (check_eval_settings, check_settings):
        with pytest.raises(ConfigError, match=message):
            check(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (HorizonConfig(eval=EvalConfig(every="5")), r"eval\.every=5 has nothing to score: no rows are held out"),
        (
            HorizonConfig(checkpoint=CheckpointConfig(keep_best=True)),
            r"checkpoint\.keep_best=True has nothing to score",
        ),
    ],
)
def test_data_that_hold_nothing_out_are_refused_where_that_is_needed(config, message):
    with pytest.raises(DataError, match=message):
        check_held_out(config, HeldOut((), ()))
    check_held_out(config, HeldOut.of(rows(1), 1, 1, 1))
    check_held_out(HorizonConfig(), HeldOut((), ()))


def test_perplexity_of_what_is_too_large_or_no_number():
    found = [score_of(Tally(1, likelihood, 0), num_rows=1).perplexity for likelihood in (0.0, -1e4, math.nan)]
    assert found[:2] == [1, math.inf] and math.isnan(found[2])
