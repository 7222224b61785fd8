"""A training run that is refused ends with settings that it then takes."""

import re

import pytest

from horizon.config.compose import compose
from horizon.errors import BudgetError
from horizon.trainer import Trainer

SETTINGS = [
    "data=text", "data.tokenizer=bytes", "device=cpu", "train.steps=1", "train.batch_size=4", "train.seq_len=64",
    "eval.rows=0", "train.sample_tokens=0", "train.save=false", "model.self_check=false",
    "model.config.hidden_size=256", "model.config.num_attention_heads=4", "model.config.intermediate_size=1024",
]  # fmt: skip


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(*more):
        return Trainer(compose([*SETTINGS, f"data.path={tmp_path}", *more]), tmp_path / "out")

    return make


def refused(trainer, *budgets):
    with pytest.raises(BudgetError, match="the nearest settings that fit: ") as caught:
        trainer(*budgets).run()
    return [change.split() for change in str(caught.value).rpartition("that fit: ")[2].split("; ")]


@pytest.mark.parametrize("budget", ["memory.device_budget=16MiB", "memory.device_budget=9MiB"])
def test_the_settings_that_a_refusal_names_are_taken(trainer, budget):
    changes = refused(trainer, budget)
    assert len(changes) == 3
    for change in changes:
        others = [budget] if not any(c.startswith("memory.device_budget") for c in change) else []
        assert trainer(*others, *change).run().steps == 1


def test_what_the_system_refuses_gets_no_advice(trainer, monkeypatch):
    def refuse(*args):
        raise BudgetError("the system refuses 3 GiB")

    monkeypatch.setattr("horizon.trainer.build_engine", refuse)
    with pytest.raises(BudgetError, match=re.escape("the system refuses 3 GiB") + "$"):
        trainer().run()
