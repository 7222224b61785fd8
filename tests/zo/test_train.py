"""`horizon train optim=mezo` and `horizon replay`, from settings to files."""

import json

import pytest
from safetensors.torch import load_file

from horizon.cli import _dispatch
from horizon.config.compose import compose
from horizon.errors import ConfigError
from horizon.optimizers import make_optimizer
from horizon.trainer import Trainer, with_lr
from tests.parity.reference import assert_same_tensors, build


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of the model that the run began with, its output folder, its summary)."""
    folder = tmp_path_factory.mktemp("mezo")
    (folder / "texts").mkdir()
    for number in range(12):
        (folder / f"texts/{number}.txt").write_text("the quick brown fox jumps over the lazy dog. " * 12)
    build("llama", tie_word_embeddings=True, vocab_size=264).save_pretrained(folder / "base")
    config = compose(
        ["optim=mezo", "model=hf", f"model.path={folder / 'base'}", "data=text", f"data.path={folder / 'texts'}",
         "data.tokenizer=bytes", "train.steps=9", "train.batch_size=4", "train.seq_len=32", "eval.rows=6",
         "train.sample_tokens=2", "optim.lr=1e-3", "optim.schedule=linear", "optim.weight_decay=0.1", "device=cpu",
         "zo.master=bf16", "zo.queries=2", "zo.writeback_every=4", "zo.momentum=0.5", "zo.momentum_steps=2", "seed=3",
         "model.freeze=[model.layers.0.mlp.*]"],
    )  # fmt: skip
    return folder / "base", folder / "run", Trainer(config, folder / "run").run()


def test_the_metrics_have_projected_gradients_and_no_norm(trained):
    _, out, summary = trained
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert all(len(row["projected_gradients"]) == 2 and row["grad_norm"] is None for row in rows)
    assert rows[0]["lr"] == 1e-3 > rows[-1]["lr"] > 0
    assert summary.validation_loss_after < summary.validation_loss_before
    assert summary.clip == "none"


def test_the_log_has_what_the_metrics_have(trained):
    base, out, _ = trained
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    header, *steps = [json.loads(line) for line in (out / "replay.jsonl").read_text().splitlines()]
    assert header["model"] == str(base) and header["seed"] == 3
    assert [(s["step"], s["lr"], s["projected_gradients"]) for s in steps] == [
        (row["step"], row["lr"], row["projected_gradients"]) for row in rows
    ]


def test_the_command_rebuilds_the_model_from_the_log(trained, tmp_path, capsys):
    base, out, _ = trained
    again = tmp_path / "again"
    assert _dispatch(["replay", f"base={base}", f"log={out / 'replay.jsonl'}", f"out={again}", "device=cpu"]) == 0
    assert capsys.readouterr().out.startswith("replayed 9 steps of")
    found, expected = (load_file(folder / "model.safetensors") for folder in (again, out / "model"))
    assert_same_tensors(found, expected)
    assert any((found[name] != value).any() for name, value in load_file(base / "model.safetensors").items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim=mezo", "optim.beta1=0.8"], "optim.beta1=0.8 has no use with optim=mezo"),
        (["optim=mezo", "optim.eps=1e-3"], "optim.eps=0.001 has no use with optim=mezo"),
        (["optim=mezo", "optim.moments=int8"], "optim.moments=int8 has no use with optim=mezo"),
        (["optim=mezo", "optim.clip=lagged"], "optim.clip=lagged has no use with optim=mezo"),
        (["zo.queries=2"], "zo.queries=2 has no use with optim=adamw"),
        (["zo.master=bf16"], "zo.master=bf16 has no use with optim=adamw"),
        (["optim=mezo", "zo.queries=0"], "zo.queries=0"),
        (["optim=mezo", "zo.eps=0"], "zo.eps=0"),
        (["optim=mezo", "zo.writeback_every=0"], "zo.writeback_every=0"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_before_the_run(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Trainer(compose(overrides), tmp_path)


def test_the_rate_that_is_not_given_is_mezos():
    config = with_lr(compose(["optim=mezo"]), None)
    assert make_optimizer(config).lr == 1e-6
