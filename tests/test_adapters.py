"""`horizon train model.lora.rank=...`: from settings to peft's folder, and on from there."""

import pytest
import torch

from horizon.commands.models import find_model
from horizon.config.compose import compose
from horizon.errors import ConfigError
from horizon.forecast.shapes import open_shape
from horizon.run_settings import check_settings, with_lr
from horizon.trainer import Trainer
from tests.parity.adapters import peft
from tests.parity.reference import assert_same_tensors, build, plain

NUM_STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base without a tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "texts").mkdir()
    for number in range(8):
        (folder / f"texts/{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 12)
    build("llama", tie_word_embeddings=True, vocab_size=264).save_pretrained(folder / "base")
    return folder


def overrides(folder, *more):
    return [
        f"model.path={folder / 'base'}", "model.self_check=false", "data=text", f"data.path={folder / 'texts'}",
        "data.tokenizer=bytes", "train.batch_size=2", "train.seq_len=32", "eval.rows=2", "train.sample_tokens=0",
        "device=cpu", "seed=3", "model.lora.rank=4", "optim.schedule=constant", *more,
    ]  # fmt: skip


def train(folder, out, *more, steps=NUM_STEPS):
    config = compose(overrides(folder, "resume=auto", f"train.steps={steps}", *more))
    return Trainer(config, out).run()


KINDS = {"adamw": ["checkpoint.save_every=3", "optim.lr=1e-2", "optim.warmup_steps=0"], "mezo": ["optim=mezo"]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_pefts_folder_and_one_that_stopped_the_same(kind, folder, tmp_path):
    summary = train(folder, tmp_path / "whole", *KINDS[kind])
    train(folder, tmp_path / "parts", *KINDS[kind], steps=3)
    train(folder, tmp_path / "parts", *KINDS[kind])
    whole, parts = (peft.utils.load_peft_weights(str(tmp_path / name / "model")) for name in ("whole", "parts"))
    assert_same_tensors(whole, parts)
    assert any("lora_B" in name and value.any() for name, value in whole.items())
    used = find_model(compose([f"model.path={tmp_path / 'whole/model'}", "device=cpu", "model.self_check=false"]))
    assert used.tokenizer_folder == tmp_path / "whole/model"
    assert used.vocab_size(compose([])) == 264
    assert summary.steps == NUM_STEPS
    with used.open(compose(["device=cpu", "model.self_check=false"])) as engine:
        tuned = peft.PeftModel.from_pretrained(build("llama", tie_word_embeddings=True, vocab_size=264), used.folder)
        batch = plain(0)
        expected = tuned.eval()(input_ids=batch["input_ids"]).logits[:, -1]
        torch.testing.assert_close(engine.next_token_logits(batch), expected, rtol=0, atol=1e-5)


def test_the_plan_is_that_of_the_model_with_its_adapter(folder):
    names = [p.name for layout in open_shape(compose(overrides(folder))).layouts for p in layout.trainable]
    assert len(names) == 2 * 7 * 2 and all("lora_" in name for name in names)


@pytest.mark.parametrize(("more", "lr"), [([], 1e-4), (["optim=mezo"], 5e-5), (["optim.lr=1e-3"], 1e-3)])
def test_the_rate_that_is_not_given_suits_an_adapter(more, lr, folder):
    assert with_lr(compose(overrides(folder, *more)), None).optim.lr == lr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.lora.rank=0"], r"model.lora: rank=0"),
        (["model.lora.rank=null", "model.lora.alpha=8"], r"model.lora.alpha=8.0 has no use with model.lora.rank=null"),
        (["optim=mezo", "model.lora.dropout=0.1"], r"zeroth-order steps have no dropout"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_before_the_run(more, message, folder):
    with pytest.raises(ConfigError, match=message):
        check_settings(compose(overrides(folder, *more)))
