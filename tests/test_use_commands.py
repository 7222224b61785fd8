"""`horizon generate` and `horizon eval` on a folder, a checkpoint and a run: what they print, and what they refuse."""

import json
import math

import pytest
import torch

import horizon
from horizon.commands import eval as evaluation
from horizon.commands import generate
from horizon.data.tokenizer import byte_tokenizer
from horizon.errors import CheckpointError, ConfigError, DataError
from tests.parity.reference import build

HERE = ["device=cpu", "model.self_check=false"]
TEXT = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same weights and tokenizer as a folder, and as the last checkpoint of a run."""
    root = tmp_path_factory.mktemp("places")
    model = build("llama", vocab_size=257, eos_token_id=None, max_position_embeddings=128)
    with horizon.Engine.from_pretrained(model, device="cpu", self_check=False) as engine:
        engine.save_pretrained(root / "folder", tokenizer=byte_tokenizer())
        engine.save_checkpoint(root / "run/checkpoints/step-00000000", tokenizer=byte_tokenizer()).wait()
    (root / "texts").mkdir()
    for name in "abcd":
        (root / "texts" / f"{name}.txt").write_text(TEXT * 3 + name * 20)
    return root, model.eval()


def written(model, prompt, new=8):
    tokenizer = byte_tokenizer()
    ids = torch.tensor([tokenizer.encode(prompt)])
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sequence = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **ends)
    return tokenizer.decode(sequence[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("place", ["folder", "run", "run/checkpoints/step-00000000"])
def test_a_prompt_is_gone_on_with(place, places, capsys):
    root, model = places
    assert generate.run([f"model.path={root / place}", "prompt=The fox = 1", "max_new_tokens=8", *HERE]) == 0
    out, err = capsys.readouterr()
    assert out == f"The fox = 1 >>> {written(model, 'The fox = 1')}\n"
    assert "keys and values of 2 layers" in err


def test_prompts_of_a_file_come_back_in_order(places, tmp_path, capsys):
    root, model = places
    texts = ["The", "A longer prompt", "x"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(texts) + "\n")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    for name in ("prompts.txt", "prompts.jsonl"):
        arguments = [f"model.path={root / 'folder'}", f"prompts={tmp_path / name}", "batch=2", "max_new_tokens=8"]
        generate.run([*arguments, "--json", *HERE])
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [(row["prompt"], row["text"]) for row in found] == [(text, written(model, text)) for text in texts]
        assert all(row["num_tokens"] <= 8 for row in found)


def test_sampling_follows_the_seed_and_several_sequences_follow_each_other(places, capsys):
    root, _ = places
    drawn = []
    for seed in (1, 1, 2):
        arguments = ["prompt=The", "do_sample=true", "top_k=50", "num_return_sequences=3", "max_new_tokens=8"]
        generate.run([f"model.path={root / 'folder'}", *arguments, f"seed={seed}", "--json", *HERE])
        drawn.append([json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 3


def test_a_text_ends_at_a_stop_string(places, capsys):
    root, model = places
    whole = written(model, "The")
    stop = json.dumps([whole[3]])
    generate.run([f"model.path={root / 'folder'}", "prompt=The", f"stop_strings={stop}", "max_new_tokens=8", *HERE])
    assert capsys.readouterr().out == f"The >>> {whole[: whole.index(whole[3]) + 1]}\n"


def test_loss_perplexity_and_accuracy_of_a_folder_of_texts(places, capsys):
    root, model = places
    data = [
        "data=text",
        f"data.path={root / 'texts'}",
        "data.packing=false",
        "data.too_long=truncate",
        "train.seq_len=128",
    ]
    assert evaluation.run([f"model.path={root / 'folder'}", *data, "pass_tokens=256", "--json", *HERE]) == 0
    found = json.loads(capsys.readouterr().out)["data"]
    losses, right = [], []
    for name in "abcd":
        ids = byte_tokenizer().encode(TEXT * 3 + name * 20)[:128]
        rows = torch.tensor([ids])
        with torch.no_grad():
            log_probs = model(input_ids=rows).logits[0, :-1].log_softmax(-1)
        losses += (-log_probs.gather(1, rows[0, 1:, None])[:, 0]).tolist()
        right += (log_probs.argmax(-1) == rows[0, 1:]).tolist()
    assert (found["rows"], found["tokens"]) == (4, len(losses))
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["token_accuracy"] == sum(right) / len(right)


def test_only_what_is_held_out_is_scored_where_that_is_asked_for(places, capsys):
    root, _ = places
    data = [
        "data=text",
        f"data.path={root / 'texts'}",
        "data.packing=false",
        "data.too_long=truncate",
        "train.seq_len=128",
    ]
    evaluation.run([f"model.path={root / 'run'}", *data, "data.validation_fraction=0.25", "--json", *HERE])
    assert json.loads(capsys.readouterr().out)["data"]["rows"] == 1
    with pytest.raises(DataError, match="nothing is held out: validation: none"):
        evaluation.run([f"model.path={root / 'run'}", *data, "data.validation_fraction=0", *HERE])


def test_questions_are_answered_and_tabulated(places, tmp_path, capsys):
    root, model = places
    line = written(model, "The", 4)
    questions = [
        {"prompt": "The", "choices": [line, "zzzzzzzzzz"], "answer": 0},
        {"prompt": "The", "choices": [line, "zzzzzzzzzz"], "answer": 1},
        {"prompt": "The", "answer": ["no", line.strip()]},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(question) for question in questions))
    arguments = [f"model.path={root / 'folder'}", f"questions={path}", "max_new_tokens=4", "stop=", *HERE]
    evaluation.run(arguments)
    table = capsys.readouterr().out
    assert "multiple choice of 2          50.00%" in table
    assert "exact match of 1             100.00%" in table
    evaluation.run([*arguments, "--json"])
    assert json.loads(capsys.readouterr().out)["questions"] == {
        str(path): {
            "multiple_choice": {"questions": 2, "accuracy": 0.5, "accuracy_per_byte": 0.5},
            "exact_match": {"questions": 1, "accuracy": 1.0},
        }
    }


@pytest.mark.parametrize(
    ("command", "arguments", "error", "message"),
    [
        (generate, ["prompt=a", "prompts=b"], ConfigError, "either prompt=TEXT or prompts=FILE"),
        (generate, ["prompt="], ConfigError, "prompt= is empty"),
        (generate, ["prompt=a", "batch=0"], ConfigError, "batch=0"),
        (generate, ["prompt=a", "--fast"], ConfigError, "no flag --fast"),
        (generate, ["prompt=a", "num_beams=2"], ConfigError, "does not support num_beams=2"),
        (generate, ["prompt=a", "temprature=2"], ConfigError, "temprature is no setting"),
        (generate, ["prompt=a", "eos_token_id=["], ConfigError, "not YAML"),
        (generate, ["prompts=/no/such/file"], DataError, "/no/such/file cannot be read"),
        (evaluation, ["memory.weight_slots=2"], ConfigError, "nothing to evaluate on"),
        (evaluation, ["questions=/no/such/file"], DataError, "/no/such/file cannot be read"),
        (evaluation, ["questions=q", "pass_tokens=many"], ConfigError, "pass_tokens=many"),
        (evaluation, ["questions=q", "--fast"], ConfigError, "no flag --fast"),
    ],
)
def test_what_cannot_be_understood_is_refused(command, arguments, error, message, places):
    root, _ = places
    with pytest.raises(error, match=message):
        command.run([f"model.path={root / 'folder'}", *arguments, *HERE])


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        generate.run([f"model.path={tmp_path / 'none'}", "prompt=a"])
    with pytest.raises(ConfigError, match=r"no model: set model\.path"):
        generate.run(["prompt=a"])
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        evaluation.run([f"model.path={tmp_path / 'run'}", "questions=q"])


def test_without_a_tokenizer_one_is_asked_for(places, tmp_path, capsys):
    model = build("llama", vocab_size=257)
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match=r"no tokenizer; set data.tokenizer"):
        generate.run([f"model.path={tmp_path / 'bare'}", "prompt=a", *HERE])
    generate.run([f"model.path={tmp_path / 'bare'}", "prompt=a", "data.tokenizer=bytes", "max_new_tokens=2", *HERE])
    assert capsys.readouterr().out.startswith("a >>> ")


def test_help_says_what_the_commands_take(capsys):
    for command in (generate, evaluation):
        for arguments in ([], ["--help"]):
            assert command.run(arguments) == 0
        assert "usage: horizon" in capsys.readouterr().out
