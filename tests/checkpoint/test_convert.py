"""Checkpoints to Hugging Face folders and back, and the commands that do it."""

import json
import tracemalloc

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import horizon
from horizon.checkpoint import convert
from horizon.checkpoint.convert import export_checkpoint, import_model
from horizon.checkpoint.folder import list_checkpoints
from horizon.checkpoint.reader import Checkpoint
from horizon.checkpoint.schedule import Due, Interval, parse_interval, prune
from horizon.cli import _dispatch
from horizon.data.tokenizer import byte_tokenizer
from horizon.errors import CheckpointError, ConfigError, UnsupportedModelError
from horizon.run_checkpoints import find_checkpoint
from tests.checkpoint.engines import LLAMA, build, load, make_batch, train

FAMILIES = ["llama", "gpt2", "gpt_neox", "mixtral", "deepseek_v3"]


def masters(engine):
    return dict(engine.named_master_parameters())


@pytest.fixture
def saved(tmp_path):
    with build(optimizer=horizon.AdamW(lr=1e-2)) as engine:
        train(engine, 1, 3)
        engine.save_checkpoint(tmp_path / "saved", tokenizer=byte_tokenizer()).wait()
        engine.kept, engine.logits = masters(engine), engine.next_token_logits(make_batch(0))
    return tmp_path / "saved", engine


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_exported_model_has_the_engines_logits(saved, tmp_path, dtype, capsys):
    path, engine = saved
    assert _dispatch(["export", str(path), str(tmp_path / "out"), f"dtype={dtype}"]) == 0
    assert "LlamaForCausalLM of step 3" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = model(make_batch(0)["input_ids"]).logits[:, -1]
    torch.testing.assert_close(logits, engine.logits, rtol=1e-4, atol=1e-5 if dtype == "fp32" else 2e-2)
    for name, parameter in model.named_parameters():
        expected = engine.kept[name]
        assert torch.equal(parameter.detach(), expected if dtype == "fp32" else expected.bfloat16().float())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_again(tmp_path, tiny_model, family):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    import_model(tmp_path / "model", tmp_path / "imported")
    checkpoint = Checkpoint(tmp_path / "imported")
    assert checkpoint.manifest.optimizer is None and checkpoint.manifest.step == 0
    for name, parameter in model.named_parameters():
        assert torch.equal(checkpoint.read(name), parameter.detach())
    with load(tmp_path / "imported") as engine:
        assert engine.num_steps == 0
        train(engine, 1, 1)
    export_checkpoint(checkpoint, tmp_path / "again", torch.float32, max_shard_size=40_000)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    state = model.state_dict()
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1


def test_neither_way_holds_the_model(tmp_path, monkeypatch):
    """Peak of Python-side and torch-side allocations: the largest tensors, not their sum."""
    big = {**LLAMA, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 256}
    with build(big) as engine:
        engine.save_checkpoint(tmp_path / "saved").wait()
        total = 4 * engine.plan.num_parameters
    sizes, read = [], Checkpoint.read

    def counted(checkpoint, name, kind="master"):
        tensor = read(checkpoint, name, kind)
        sizes.append(tensor.nbytes)
        return tensor

    def there_and_back(name):
        export_checkpoint(Checkpoint(tmp_path / "saved"), tmp_path / name, torch.bfloat16, max_shard_size=total // 4)
        import_model(tmp_path / name, tmp_path / f"{name}, imported")

    there_and_back("first")  # loads what it needs, which would count
    monkeypatch.setattr(Checkpoint, "read", counted)
    tracemalloc.start()
    there_and_back("second")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(sizes) == total and max(sizes) < total / 16
    assert peak < total / 2


def test_what_cannot_be_imported_leaves_nothing(tmp_path, tiny_config, monkeypatch):
    tiny_config("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match=r"bare has no weights; expected a Hugging Face folder"):
        import_model(tmp_path / "bare", tmp_path / "out")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/config.json").write_text('{"model_type": "no_such"}')
    (tmp_path / "odd/model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModelError):
        import_model(tmp_path / "odd", tmp_path / "out")

    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path / "good")

    def broken(*arguments):
        raise CheckpointError("a shard is damaged")

    monkeypatch.setattr(convert, "import_weights", broken)
    with pytest.raises(CheckpointError, match="a shard is damaged"):
        import_model(tmp_path / "good", tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


# ---- the commands


@pytest.fixture
def run_folder(tmp_path):
    with build() as engine:
        for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, 2.7)):
            train(engine, step, step)
            run = {"step": step, "tokens": 32 * step, "validation_loss": loss}
            engine.save_checkpoint(tmp_path / f"run/checkpoints/step-{step:08d}", run=run).wait()
    return tmp_path / "run"


def test_ls_lists_them_with_the_best(run_folder, capsys):
    assert _dispatch(["checkpoint", "ls", str(run_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"step-{step:08d}" for step in (1, 2, 3, 4)]
    assert "LlamaForCausalLM at step 2, float32 moments  64 tokens  validation loss 2.0000  best" in lines[1]
    (run_folder / "checkpoints/step-00000003/manifest.json").write_text("{")
    _dispatch(["checkpoint", "ls", str(run_folder / "checkpoints")])
    assert "truncated or damaged" in capsys.readouterr().out.splitlines()[2]


def test_verify_tells_of_every_byte(run_folder):
    checkpoint, told = Checkpoint(find_checkpoint(run_folder)), list[int]()
    checkpoint.verify(told.append)
    assert sum(told) == checkpoint.manifest.num_bytes


def test_verify_reads_all_and_names_what_is_damaged(run_folder, capsys):
    assert _dispatch(["checkpoint", "verify", str(run_folder)]) == 0
    assert "step-00000004: 90 arrays, 321 KiB, all as they were written" in capsys.readouterr().out
    chunk = run_folder / "checkpoints/step-00000004/arrays/model.norm.weight/exp_avg/c.0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \(exp_avg\)"):
        _dispatch(["checkpoint", "verify", str(run_folder)])


def test_diff_says_what_differs_and_nothing_else(run_folder, capsys):
    one, two = (str(run_folder / f"checkpoints/step-0000000{step}") for step in (1, 2))
    assert _dispatch(["checkpoint", "diff", one, one]) == 0
    assert capsys.readouterr().out == "the same, bit for bit\n"
    assert _dispatch(["checkpoint", "diff", one, two]) == 1
    shown = capsys.readouterr().out
    assert "step: 1 in the first, 2 in the second" in shown
    assert "run.validation_loss: 3.0 in the first, 2.0 in the second" in shown
    assert "model.norm.weight (master): 32 of 32 numbers differ, by up to" in shown


def test_prune_keeps_the_last_and_the_best(run_folder, capsys):
    assert _dispatch(["checkpoint", "prune", str(run_folder), "keep=1", "keep_best=true"]) == 0
    assert [step for step, _ in list_checkpoints(run_folder / "checkpoints")] == [2, 4]
    assert capsys.readouterr().out.count("removed ") == 2
    assert prune(run_folder / "checkpoints", None, keep_best=False) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "/no/such", "out"], r"^/no/such: no checkpoint there"),
        (["export", "one"], r"expected 2 folders, got 1; usage: horizon export CHECKPOINT FOLDER"),
        (["export", "a", "b", "dtype=int4"], r"dtype=int4: expected bf16, fp16, fp32"),
        (["export", "a", "b", "dtyp=bf16"], r"dtyp is no option here; expected dtype, shard"),
        (["checkpoint", "list"], r"horizon checkpoint takes ls, verify, diff, prune"),
        (["checkpoint", "ls", "/no/such"], r"/no/such has no checkpoints"),
        (["checkpoint", "prune", "/no/such"], r"keep=: expected how many checkpoints"),
    ],
)
def test_a_command_that_cannot_work_says_why(arguments, message):
    with pytest.raises((CheckpointError, ConfigError), match=message):
        _dispatch(arguments)


@pytest.mark.parametrize("command", ["export", "import", "checkpoint"])
def test_every_command_says_how_it_is_used(command, capsys):
    assert _dispatch([command]) == _dispatch([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: horizon {command}")


# ---- when to save


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("100", 100, "steps"), ("1", 1, "steps"), ("1e3", 1000, "steps"), ("20steps", 20, "steps"),
        ("10min", 600, "seconds"), ("90s", 90, "seconds"), ("1.5h", 5400, "seconds"),
        ("1e9tokens", 1e9, "tokens"), ("5000 tokens", 5000, "tokens"),
    ],
)  # fmt: skip
def test_intervals(text, amount, unit):
    assert parse_interval(text) == Interval(amount, unit)


@pytest.mark.parametrize("text", ["", "0", "-1", "often", "1.5", "10 parsecs", "0min", "1e9token5"])
def test_what_is_no_interval_is_refused(text):
    with pytest.raises(
        ConfigError, match=r"checkpoint\.save_every=.* expected steps such as 100, a time such as 10min"
    ):
        parse_interval(text)


def test_saves_are_due_at_the_same_steps_whether_or_not_the_run_was_resumed():
    for resumed in (0, 7):
        due, saved = Due(parse_interval("5"), resumed, 0), []
        for step in range(resumed + 1, 21):
            if due.is_due(step, 0):
                due.saved(step, 0)
                saved.append(step)
        assert saved == [step for step in (5, 10, 15, 20) if step > resumed]
    now = [0.0]
    due = Due(parse_interval("10min"), 0, 0, clock=lambda: now[0])
    found = []
    for step in range(1, 10):
        now[0] += 250
        if due.is_due(step, 0):
            due.saved(step, 0)
            found.append(step)
    assert found == [3, 6, 9]
    due, found = Due(parse_interval("1000tokens"), 0, 0), []
    for step in range(1, 9):
        if due.is_due(step, 300 * step):
            due.saved(step, 300 * step)
            found.append(step)
    assert found == [4, 7]
