"""The command as a user meets it: its own process, exit codes, and what it prints where."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from horizon.cli import main
from horizon.config.compose import compose
from horizon.forecast.shapes import open_shape

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "horizon"]

# Stands in for the trainer: what happens around it is the subject here.
STUB = """
import sys
from types import ModuleType, SimpleNamespace
from horizon.errors import BudgetError

class Trainer:
    def __init__(self, config, output_dir, command):
        self.config, self.output_dir, self.command = config, output_dir, command

    def run(self):
        {body}
        return SimpleNamespace(validation_loss_after=1.0)

sys.modules["horizon.trainer"] = ModuleType("horizon.trainer")
sys.modules["horizon.trainer"].Trainer = Trainer
sys.argv[0] = "horizon"
from horizon.cli import main
main()
"""


def start(command, folder, **env):
    """Run `command` in `folder` with this checkout's horizon, installed or not."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": path, **env}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=100, env=env)


@pytest.fixture
def horizon(tmp_path):
    return lambda *arguments, **env: start([*COMMAND, *arguments], tmp_path, **env)


@pytest.fixture
def inside(tmp_path, monkeypatch, capsys):
    """Runs the command in this process, which has imported already what takes it seconds."""

    def run(*arguments, **env):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.chdir(tmp_path)
            patch.setattr(gc, "disable", lambda: None)  # done for a process that ends soon
            patch.setattr(sys, "argv", ["horizon", *arguments])
            for name, value in env.items():
                patch.setenv(name, value)
            main()
        shown = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, end.value.code, shown.out, shown.err)

    return run


@pytest.fixture
def stubbed(tmp_path):
    """Runs the command with a trainer whose `run` is the given statement."""
    return lambda body, *arguments: start([sys.executable, "-c", STUB.format(body=body), *arguments], tmp_path)


def test_help_lists_the_commands_and_version_is_the_packages(horizon):
    import horizon as package

    assert horizon("--version").stdout == f"horizon {package.__version__}\n"
    for arguments in (["--help"], []):
        shown = horizon(*arguments)
        assert shown.returncode == 0
        assert all(f"horizon {command}" in shown.stdout for command in ("train", "plan", "doctor", "check", "replay"))


def test_an_unknown_command_is_one_line(horizon):
    done = horizon("trian")
    assert done.returncode == 1
    commands = "train, data, generate, eval, plan, doctor, check, replay, export, import, checkpoint, bench, report"
    assert done.stderr == f"horizon: ConfigError: 'trian' is no command; expected {commands} (horizon --help)\n"


def test_train_help_shows_groups_settings_and_flags(horizon):
    shown = horizon("train", "--help").stdout
    assert "data: auto, instruction, messages, mixture, python_stdlib, sharegpt, text, text_field, tokens" in shown
    assert "batch_size: 4" in shown
    assert "--config-dir" in shown
    assert 'eval "$(horizon train -sc install=bash)"' in shown


def test_cfg_job_prints_the_settings_with_overrides_and_trains_nothing(horizon, tmp_path):
    done = horizon("train", "--cfg", "job", "optim.lr=0.5", "data=text")
    assert done.returncode == 0
    assert "lr: 0.5" in done.stdout and "format: text" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [[], ["--cfg", "job"], ["-m"]], ids=["run", "cfg", "sweep"])
def test_a_wrong_key_is_one_line_and_exit_code_1(horizon, flags):
    done = horizon("train", *flags, "optim.lrr=1")
    assert done.returncode == 1
    assert done.stderr == "horizon: ConfigError: optim.lrr is no setting; did you mean optim.lr?\n"


def test_a_named_error_of_a_run_is_one_line_and_exit_code_1(stubbed):
    done = stubbed("raise BudgetError('needs 3 GiB\\n but 2 GiB are there')", "train")
    assert done.returncode == 1
    assert done.stderr == "horizon: BudgetError: needs 3 GiB but 2 GiB are there\n"


def test_bad_data_is_one_line_and_exit_code_1(horizon):
    done = horizon("train", "data=text", "data.path=no_such_folder")
    assert done.returncode == 1
    assert done.stderr.startswith("horizon: DataError: ") and "no_such_folder" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unknown_exception_keeps_its_traceback(stubbed):
    done = stubbed("raise ZeroDivisionError('deep inside')", "train")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError: deep inside" in done.stderr


def test_an_interrupt_is_one_line_and_exit_code_130(stubbed):
    done = stubbed("raise KeyboardInterrupt", "train")
    assert (done.returncode, done.stderr) == (130, "horizon: interrupted\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_any_more_ends_a_command_without_a_word(tmp_path, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([*COMMAND, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=env)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_pipe_that_breaks_keeps_its_traceback(stubbed):
    done = stubbed("raise BrokenPipeError('of a tracker')", "train")
    assert done.returncode == 1 and "BrokenPipeError: of a tracker" in done.stderr


def test_a_sweep_runs_every_value_in_a_folder_of_its_own(stubbed, tmp_path):
    body = "(self.output_dir / 'seen').write_text(str(self.config.optim.lr))"
    done = stubbed(body, "train", "-m", "optim.lr=0.25,0.5")
    assert done.returncode == 0, done.stderr
    seen = {path.parent.name: path.read_text() for path in tmp_path.glob("multirun/*/*/*/seen")}
    assert seen == {"0": "0.25", "1": "0.5"}


def test_a_sweep_reports_a_failing_run_goes_on_and_exits_1(stubbed, tmp_path):
    body = "if self.config.seed == 0: raise BudgetError('no room')\n        (self.output_dir / 'seen').touch()"
    done = stubbed(body, "train", "-m", "seed=0,1")
    assert done.returncode == 1
    assert done.stderr == "horizon: BudgetError: no room\n"
    assert [path.parent.name for path in tmp_path.glob("multirun/*/*/*/seen")] == ["1"]
    assert "0 failed: BudgetError: no room" in done.stdout


def test_a_sweep_that_ends_with_an_unknown_exception_compares_what_there_is(stubbed, tmp_path):
    body = "if self.config.seed == 0: raise ZeroDivisionError('deep')\n        (self.output_dir / 'seen').touch()"
    done = stubbed(body, "train", "-m", "seed=0,1")
    assert done.returncode == 1 and "ZeroDivisionError: deep" in done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 ")][:2] == [
        ["0", "0"],
        ["1", "1"],
    ]
    assert len(list(tmp_path.glob("multirun/*/*/comparison.html"))) == 1


def test_one_run_gets_a_dated_folder_with_hydras_record_and_no_change_of_directory(stubbed, tmp_path):
    done = stubbed("import os; print('in', os.getcwd())", "train", "seed=3")
    assert f"in {tmp_path}" in done.stdout
    (record,) = tmp_path.glob("outputs/*/*/.hydra/overrides.yaml")
    assert record.read_text() == "- seed=3\n"


def test_a_run_knows_the_command_that_goes_on_with_it(stubbed, tmp_path):
    def shown(*words):
        done = stubbed("print('again:', self.command)", "train", *words)
        assert done.returncode == 0, done.stderr
        return [line.removeprefix("again: ") for line in done.stdout.splitlines() if line.startswith("again: ")]

    (dated,) = shown("seed=3", "optim.lr=1e-3")
    (folder,) = (path.relative_to(tmp_path) for path in tmp_path.glob("outputs/*/*"))
    assert dated == f"horizon train seed=3 optim.lr=1e-3 hydra.run.dir={folder}"
    given = ["hydra.run.dir=my run", "resume=auto", "data.path=a b", "model.freeze=[a.*,b]"]
    assert shown(*given) == ["horizon train 'data.path=a b' 'model.freeze=[a.*,b]' 'hydra.run.dir=my run'"]
    swept = shown("-m", "seed=0,1", "hydra.sweep.dir=sweep")
    assert swept == [f"horizon train seed={n} hydra.run.dir=sweep/{n}" for n in (0, 1)]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/first.yaml").write_text("defaults:\n  - config\n  - _self_\nseed: 5\n")
    (own,) = shown("--config-dir", "mine", "-cn", "first", "hydra.run.dir=out")
    assert own == f"horizon train --config-dir {tmp_path}/mine --config-name first hydra.run.dir=out"


def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(tmp_path):
    code = STUB.format(body="import os; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)")
    command = [sys.executable, "-c", code, "train"]
    assert start(command, tmp_path).stdout == "PASSIVE False\n"
    assert start(command, tmp_path, OMP_WAIT_POLICY="ACTIVE").stdout == "ACTIVE False\n"


def test_a_folder_of_the_users_own_adds_options_and_primary_configs(horizon, tmp_path):
    (tmp_path / "mine/memory").mkdir(parents=True)
    (tmp_path / "mine/memory/box.yaml").write_text("host_budget: 24GiB\n")
    (tmp_path / "mine/big.yaml").write_text("defaults:\n  - config\n  - override memory: box\n  - _self_\nseed: 9\n")
    shown = horizon("train", "--config-dir", "mine", "--cfg", "job", "memory=box").stdout
    assert "host_budget: 24GiB" in shown and "seed: 0" in shown
    shown = horizon("train", "--config-dir", "mine", "-cn", "big", "--cfg", "job").stdout
    assert "host_budget: 24GiB" in shown and "seed: 9" in shown and "model_type: llama" in shown


def test_a_users_option_with_a_wrong_key_is_named(horizon, tmp_path):
    (tmp_path / "mine/optim").mkdir(parents=True)
    (tmp_path / "mine/optim/fast.yaml").write_text("lrr: 1\n")
    done = horizon("train", "--config-dir", "mine", "--cfg", "job", "optim=fast")
    assert done.returncode == 1
    assert "'lrr'" in done.stderr or "optim.lrr" in done.stderr


@pytest.mark.parametrize(
    ("line", "choices"),
    [
        (
            "horizon ",
            [
                "train",
                "data",
                "generate",
                "eval",
                "plan",
                "doctor",
                "check",
                "replay",
                "export",
                "import",
                "checkpoint",
                "bench",
                "report",
            ],
        ),
        ("horizon tr", ["train"]),
        ("horizon train opt", ["optim.", "optim="]),
        ("horizon train optim.lr", ["optim.lr="]),
        ("horizon train data=t", ["data=text", "data=text_field", "data=tokens"]),
        ("horizon train data=text train.step", ["train.steps="]),
        ("horizon check model=opt-1", ["model=opt-1.3b", "model=opt-13b"]),
    ],
)
def test_completion_answers_the_typed_line(horizon, line, choices):
    done = horizon("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert (done.stdout.split(), done.returncode) == (choices, 0)


def test_the_installed_completion_works_in_bash(tmp_path):
    """What `horizon train -sc install=bash` prints, run by bash as TAB would run it."""
    script = tmp_path / "bin" / "horizon"
    script.parent.mkdir()
    program = "import sys; sys.argv[0] = 'horizon'; from horizon.cli import main; main()"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{program}" "$@"\n')
    script.chmod(0o755)
    press_tab = (
        'eval "$(horizon train -sc install=bash)"; COMP_LINE="horizon train opt" COMP_POINT=17 COMP_CWORD=2; '
        'hydra_bash_completion; printf "%s " "${COMPREPLY[@]}"; complete -p horizon'
    )
    done = start(["bash", "-c", press_tab], tmp_path, PATH=f"{script.parent}:{os.environ['PATH']}")
    assert done.stdout.startswith("optim. optim= complete "), done.stderr


def test_check_without_arguments_says_how_it_is_used(horizon):
    assert "usage: horizon check model.path=" in horizon("check").stdout


def test_check_names_a_wrong_key(horizon):
    done = horizon("check", "modell=tiny_llama")
    assert (done.returncode, done.stderr) == (1, "horizon: ConfigError: modell is no setting; did you mean model?\n")


# ---- plan and doctor

SHAPE = ["model=qwen2.5-7b", "train.batch_size=32", "train.seq_len=1024", "machine=h200"]


def test_plan_prints_one_json_object_and_exits_with_0_where_it_fits(inside):
    done = inside("plan", "--json", *SHAPE, "memory.device_budget=24GiB")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["fits"] and answer["model"]["parameters"] == 7_615_616_512
    assert answer["model"]["name"] == "qwen2.5-7b" and answer["machine"]["source"] == "machine=h200"
    assert answer["plan"]["device_bytes"] <= 24 << 30
    assert answer["plan"]["step"]["tokens"] == 32768


def test_plan_exits_with_1_where_it_does_not_fit_and_names_what_would(inside):
    done = inside("plan", "--json", *SHAPE, "memory.host_budget=70GiB", "memory.device_budget=24GiB")
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert not answer["fits"] and answer["refusal"]["tier"] == "host" and len(answer["alternatives"]) == 3
    assert {"optim.moments": "int8"} in [other["settings"] for other in answer["alternatives"]]
    done = inside("plan", *SHAPE, "memory.host_budget=70GiB", "memory.device_budget=24GiB")
    assert done.returncode == 1
    assert "does not fit: needs " in done.stdout and "  optim.moments=int8 " in done.stdout


def test_plan_of_this_machine_says_where_its_facts_are_from_and_keeps_the_shape_alone(inside, tmp_path):
    done = inside("plan", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "(a quick measurement; horizon doctor --measure makes a better one)" in done.stdout.splitlines()[0]
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert kept.parent == tmp_path / "cache" / "horizon" / "shapes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optim.lrr=1"], "ConfigError: optim.lrr is no setting; did you mean optim.lr?"),
        (["machine=nowhere.yaml"], "ConfigError: machine=nowhere.yaml: no such file;"),
        (["--jsn"], "ConfigError: horizon plan has no flag --jsn; expected --json"),
        (["train.batch_size=0"], "ConfigError: train.batch_size=0 must be at least 1"),
        (["machine=h200", "device=cuda:3"], "ConfigError: device='cuda:3', but the machine"),
        (["model.path=nowhere"], "CheckpointError: no such folder"),
    ],
)
def test_what_plan_cannot_understand_is_one_line(inside, arguments, message):
    done = inside("plan", *([] if arguments == ["--jsn"] else ["--json"]), *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"horizon: {message}") and done.stderr.count("\n") == 1


def test_plan_and_doctor_have_help(horizon):
    assert "machine=FILE" in horizon("plan", "--help").stdout and "h200" in horizon("plan", "-h").stdout
    assert "--measure" in horizon("doctor", "--help").stdout


def test_doctor_prints_one_json_object(inside):
    done = inside("doctor", "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == (0 if answer["ok"] else 1)
    assert {"name", "status", "found", "fix"} == set(answer["checks"][0])


def test_replay_explains_itself_and_refuses_what_it_does_not_know(horizon):
    for arguments in ([], ["--help"]):
        assert "usage: horizon replay base=FOLDER_OR_HUB_ID log=FILE out=FOLDER" in horizon("replay", *arguments).stdout
    for arguments in (["base=a", "log=b"], ["base=a", "log=b", "out=c", "speed=9"], ["base=a", "log=b", "out"]):
        done = horizon("replay", *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith(f"horizon: ConfigError: replay {' '.join(arguments)}: expected base=FOLDER log=")


def test_replay_of_what_is_not_there_is_one_line(inside):
    done = inside("replay", "base=nowhere", "log=none", "out=c")
    assert done.returncode == 1
    assert done.stderr.startswith("horizon: CheckpointError: no such folder")


def test_plan_foretells_zeroth_order_steps(inside):
    done = inside("plan", "optim=mezo", "machine=h200", *SHAPE)
    assert done.returncode == 0, done.stderr
    assert "perturbed copies" in done.stdout and "predicted step" in done.stdout
    refused = inside("plan", "optim=mezo", "machine=h200", "memory.host_budget=1MiB", "--json", *SHAPE)
    assert refused.returncode == 1 and json.loads(refused.stdout)["refusal"]["tier"] == "host"


HEAVY = (
    "accelerate", "liger_kernel", "matplotlib", "numba", "pandas", "peft", "sklearn", "tensorstore", "torchvision",
    "transformers", "triton",
)  # fmt: skip


def test_planning_again_imports_nothing_that_only_training_needs(tmp_path):
    open_shape(compose(["model=llama-3.1-405b"]))  # kept; else its code would have to be loaded
    code = f"""
import sys
from horizon import cli
sys.argv = ["horizon", "plan", "machine=h200", "model=llama-3.1-405b"]
try:
    cli.main()
except SystemExit as end:
    print(end.code, [name for name in {HEAVY} if name in sys.modules])
"""
    done = start([sys.executable, "-c", code], tmp_path)
    assert done.stdout.splitlines()[-1] == "1 []", done.stderr
    assert "does not fit" in done.stdout
