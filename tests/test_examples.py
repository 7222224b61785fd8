"""Each example does what it shows, in fewer steps than it takes on its own."""

import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_loop_learns(capsys):
    losses = load("own_loop").main(steps=20, device="cpu")
    assert losses[0] == pytest.approx(math.log(256), abs=0.4)
    assert losses[-1] < losses[0] - 1.5
    shown = capsys.readouterr().out
    assert "4 blocks, 434,816 parameters" in shown
    assert "step 20: loss" in shown
    assert "    def " in shown


def test_finetune_folder_gives_back_a_folder_that_learned(tmp_path):
    before, after = load("finetune_folder").main(tmp_path, steps=25, device="cpu")
    assert before == pytest.approx(math.log(256), abs=0.2)
    assert after < before - 1
    assert {path.name for path in (tmp_path / "tuned").iterdir()} >= {"config.json", "model.safetensors"}


def test_sft_messages_learns_the_answers_and_trains_on_nothing_else(tmp_path, capsys):
    example = load("sft_messages")
    assert example.main(tmp_path, steps=60, device="cpu") == example.FACTS
    (trained,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trained on")]
    replies = trained.partition("'")[2].rstrip("'").split("<|im_end|>")
    assert replies.pop() == ""
    assert replies and set(replies) <= set(example.FACTS.values())


def test_pretrain_folder_lowers_the_held_out_loss_and_leaves_a_model(tmp_path, capsys):
    before, after = load("pretrain_folder").main(tmp_path, steps=20, device="cpu")
    assert before == pytest.approx(math.log(257), abs=0.2) and after < before - 1
    shown = capsys.readouterr().out
    assert f"text in {tmp_path / 'texts'}" in shown and "rows of 128" in shown
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_gradient_accumulation_gives_one_step_in_three_ways(capsys):
    differences = load("gradient_accumulation").main(device="cpu")
    assert set(differences) == {"one batch", "added up"}
    assert all(difference < 1e-5 for difference in differences.values())
    assert "over 372 tokens" in capsys.readouterr().out  # 4 rows x (47 + 38 + 8) predicted tokens


def test_custom_loss_brings_the_student_nearer():
    before, after = load("custom_loss").main(steps=30, device="cpu")
    assert 0 < after < 0.97 * before


def test_resume_goes_on_with_the_losses_of_a_run_that_never_stopped(tmp_path, capsys):
    example = load("resume")
    whole = example.main(tmp_path / "whole", steps=25, device="cpu")
    first = example.main(tmp_path / "stopped", steps=13, device="cpu")
    second = example.main(tmp_path / "stopped", steps=25, device="cpu")
    assert "going on from step 10" in capsys.readouterr().out
    assert list(second) == list(range(11, 26))
    assert {**first, **second} == whole
    assert whole[25] < whole[1] - 1


def test_zeroth_order_answers_better_and_replays(capsys):
    before, after = load("zeroth_order").main(steps=40, device="cpu")
    assert after < before - 0.1
    assert f"KiB: {after:.1%}" in capsys.readouterr().out


def test_evaluate_checkpoint_finds_what_was_learned(tmp_path, capsys):
    found = load("evaluate_checkpoint").main(tmp_path, steps=60, device="cpu")
    assert found["choices"] == found["texts"] == 1
    assert found["learned"] > 0.6 > 0.3 > found["other"]
    assert "Norway: Oslo" in capsys.readouterr().out


def test_callbacks_hear_of_evaluations_and_checkpoints(tmp_path):
    lines = load("callbacks").main(tmp_path, steps=30, device="cpu")
    scored = [line for line in lines if "perplexity" in line]
    assert [line.split(":")[0] for line in scored] == ["step 0", "step 10", "step 20", "step 30"]
    before, after = (int(line.split(", ")[1].partition("%")[0]) for line in (scored[0], scored[-1]))
    assert after > before + 20
    assert [line.split(";")[0] for line in lines if "safe" in line] == [
        "step 15 is safe in step-00000015",
        "step 30 is safe in step-00000030",
    ]
    assert lines[-1].startswith("30 steps, the slowest was step ")


def test_a_sweep_finds_the_better_rate_and_ends_with_the_comparison(tmp_path, capfd):
    assert load("sweep_learning_rates").main(tmp_path, rates=(1e-5, 1e-2), steps=12, device="cpu") == 1e-2
    table = capfd.readouterr().out.partition("runs of ")[2].splitlines()
    assert table[1].split()[:2] == ["run", "optim.lr"] and table[3].split()[:3] == ["1", "0.01", "finished"]
    assert (tmp_path / "sweep" / "comparison.html").is_file() and (tmp_path / "sweep" / "0" / "report.html").is_file()


def test_every_example_is_short_and_run_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    text = Path(__file__).read_text()
    assert names and all(f'load("{name}")' in text for name in names)
    assert all(len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 100 for name in names)
