import json
import re

import numpy as np
import pytest

from horizon.commands import data as command
from horizon.config.compose import compose
from horizon.data import load_run_data
from horizon.data.preview import histogram, preview
from horizon.errors import ConfigError


@pytest.fixture
def overrides(tmp_path, make_chat_tokenizer, chatml):
    make_chat_tokenizer(chatml).save_pretrained(tmp_path / "tokenizer")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    lines = [json.dumps({"messages": talk})] * 4 + ["{"]
    (tmp_path / "f.jsonl").write_text("\n".join(lines))
    return [
        "data=messages", f"data.path={tmp_path / 'f.jsonl'}", f"data.tokenizer={tmp_path / 'tokenizer'}",
        "data.on_error=skip", "data.validation_fraction=0.25", "train.seq_len=64", "train.steps=30",
        "train.batch_size=2",
    ]  # fmt: skip


def test_samples_are_shown_with_the_trained_tokens_marked(overrides):
    config = compose(overrides)
    shown = preview(load_run_data(config, None), config, 1, 500)
    assert "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n«yo<|im_end|>»\n" in shown
    assert re.search(r"f\.jsonl:\d, \d+ tokens, 3 trained, between « and »", shown)
    assert shown.count("between «") == 1


def test_counts_and_epochs_are_those_of_the_run(overrides):
    config = compose(overrides)
    data = load_run_data(config, None)
    shown = preview(data, config, 0, 0)
    assert "f.jsonl: 3 documents to train on, 1 held out; 0 split, 0 truncated, 0 dropped" in shown
    assert "1 records that cannot be read (the first: " in shown and "f.jsonl:5: not JSON" in shown
    tokens, rows = int(data.train.num_tokens.sum()), len(data.train)
    assert f"an epoch: {tokens:,} tokens in {rows} rows of 64, {rows / 2:.1f} steps" in shown
    assert f"the run: 30 steps of 2 rows, {60 / rows:.2f} epochs, {60 * tokens // rows:,} tokens" in shown


def test_a_weighted_mixture_says_what_each_source_gives(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(['{"text": "0123456"}'] * 10))  # 8 tokens each
    sources = ",".join(f"{{path: {tmp_path / name}.jsonl, weight: {w}}}" for name, w in (("a", 3), ("b", 1)))
    config = compose(
        ["data=mixture", f"data.sources=[{sources}]", "data.tokenizer=bytes", "train.seq_len=8",
         "data.validation_fraction=0"]
    )  # fmt: skip
    shown = preview(load_run_data(config, None), config, 0, 0)
    assert "a.jsonl: 120 tokens of an epoch, 1.50 times all that it has" in shown
    assert "b.jsonl: 40 tokens of an epoch, 0.50 times all that it has" in shown
    assert "an epoch: 160 tokens in 20 rows of 8, 5.0 steps" in shown


def test_the_histogram_counts_by_powers_of_two():
    lines = histogram(np.array([3, 4, 5, 8, 8, 8, 100])).splitlines()
    counts = {int(line.split()[2]): int(line.split()[3]) for line in lines[:-1]}
    assert counts == {4: 2, 8: 4, 16: 0, 32: 0, 64: 0, 128: 1}
    assert [line.count("#") for line in lines[:-1]] == [20, 40, 0, 0, 0, 10]
    assert lines[-1].strip() == "half have at most 8, 95 % at most 72, the longest 100"


def test_the_command_shows_it_without_a_model(overrides, capsys, monkeypatch):
    monkeypatch.setattr("horizon.engine.Engine.from_pretrained", None)
    assert command.run(["preview", "--samples", "2", "--chars", "20", *overrides]) == 0
    shown = capsys.readouterr().out
    assert shown.count("between «") == 2 and "<|im_start|>user\nhi< [...]" in shown and "epochs" in shown


def test_the_command_says_how_it_is_called(capsys):
    for arguments in ([], ["--help"], ["preview", "-h"]):
        assert command.run(arguments) == 0
        assert capsys.readouterr().out.startswith("usage: horizon data preview")
    for arguments, message in (
        (["show"], "horizon data show is no command; expected preview"),
        (["preview", "--rows"], "has no flag --rows"),
        (["preview", "--samples", "x"], "--samples x: expected a number"),
        (["preview", "data.pth=3"], "data.pth is no setting; did you mean data.path"),
    ):
        with pytest.raises(ConfigError, match=message):
            command.run(arguments)
