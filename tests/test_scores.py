"""`Engine.score`: losses and right predictions row by row, as transformers' own logits give them."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import horizon
from horizon.errors import BatchError
from horizon.eval.metrics import Tally, tally_rows
from horizon.stream import forward
from tests.test_engine import CONFIG


def batch_of(seed, rows, tokens=16):
    """Random rows, some labels left out; the last row has none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, tokens), generator=generator)
    labels = ids.where(torch.rand(ids.shape, generator=generator) > 0.3, -100)
    labels[-1] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("optimizer", [horizon.AdamW(), horizon.ZerothOrder(lr=1e-3)], ids=["adamw", "mezo"])
@pytest.mark.parametrize("chunk", [64, 5])
def test_scores_are_those_of_the_plain_model(monkeypatch, optimizer, chunk):
    whole = forward.token_scores
    monkeypatch.setattr(forward, "token_scores", lambda *found: whole(*found[:4], chunk))
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG)).eval()
    with torch.no_grad():  # sure of itself, so that some predictions are right
        model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight))
        model.model.embed_tokens.weight.copy_(model.lm_head.weight.roll(-1, 0))
    batches = [batch_of(0, 3), batch_of(1, 2)]
    batches[0]["input_ids"][0] = torch.arange(16) + 3  # counts up
    batches[0]["labels"][0] = batches[0]["input_ids"][0]
    with horizon.Engine.from_pretrained(model, device="cpu", self_check=False, optimizer=optimizer) as engine:
        scores = engine.score(batches)
        mean = engine.evaluate(batches)
    assert [s.correct.shape for s in scores] == [(3, 16), (2, 16)]
    assert not any((s.correct & ~s.trained).any() or s.log_likelihoods[~s.trained].any() for s in scores)
    found, expected = tally_rows(scores), []
    for batch in batches:
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)
        correct = (logits.argmax(-1) == labels).sum(1)
        expected += zip(losses.tolist(), correct.tolist(), (labels != -100).sum(1).tolist(), strict=True)
    losses = [-row.log_likelihood for row in found]
    assert losses == pytest.approx([loss for loss, _, _ in expected], rel=1e-4, abs=1e-5)
    assert [(row.num_correct, row.num_tokens) for row in found] == [tuple(rest) for _, *rest in expected]
    assert sum(row.num_correct for row in found) > 5
    assert found[2] == found[4] == Tally()
    assert sum(losses) / sum(row.num_tokens for row in found) == pytest.approx(mean, rel=1e-6)


def test_rows_without_any_label_cannot_be_scored():
    with (
        horizon.Engine.from_config(CONFIG, device="cpu", self_check=False) as engine,
        pytest.raises(BatchError, match="no token of the batch is trained"),
    ):
        engine.score(batch_of(0, 1))
