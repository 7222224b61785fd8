"""What the documents say is what the code does: settings, commands, links, and the README's script."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from horizon.checkpoint.manifest import Manifest
from horizon.config.compose import compose
from horizon.config.schema import HorizonConfig
from horizon.data.tokenizer import byte_tokenizer
from horizon.inference import InferenceEngine
from horizon.records import CheckpointRow, EvalRow, Score, StepRow, StepSplit
from horizon.report.facts import RunFacts
from tests.checkpoint.engines import build, train
from tests.parity import reference
from tests.parity.reference import FAMILIES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README, CONFIGURATION = ((ROOT / name).read_text() for name in ("README.md", "docs/configuration.md"))


def fenced(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def table(text, heading):
    """First cell -> second cell of the first table after `heading`, as they are written."""
    rows = re.search(r"((?:^\|.*\n)+)", text[text.index(heading) :], re.MULTILINE)[1].splitlines()[2:]
    return {cells[1].strip(" `"): cells[2].strip() for cells in (row.split("|") for row in rows)}


def settings_of(node, prefix=""):
    """Every key of the schema and its default as YAML writes it."""
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from settings_of(value, key + ".")
        else:
            yield key, OmegaConf.to_yaml([value]).removeprefix("- ").strip() if not isinstance(value, list) else "[]"


def test_every_setting_is_listed_with_its_default():
    listed = {}
    for section in (
        "### model", "### data", "### optim", "### zo", "### train", "### eval", "### memory", "### checkpoint",
        "### top level",
    ):  # fmt: skip
        listed |= {key: default.strip("`") for key, default in table(CONFIGURATION, section).items()}
    assert listed == dict(settings_of(HorizonConfig())) | {"model.config": "tiny_llama's"}


def test_every_option_of_a_group_is_listed():
    listed = {
        group: set(re.findall(r"`([\w.-]+)`", options)) for group, options in table(CONFIGURATION, "## Groups").items()
    }
    folders = [folder for folder in (ROOT / "conf").iterdir() if folder.is_dir()]
    assert listed == {folder.name: {path.name.removesuffix(".yaml") for path in folder.iterdir()} for folder in folders}


METRICS = (ROOT / "docs/metrics.md").read_text()


@pytest.mark.parametrize(
    ("file", "kind"), [("metrics.jsonl", StepRow), ("evaluations.jsonl", EvalRow), ("checkpoints.jsonl", CheckpointRow)]
)
def test_every_field_of_the_rows_that_a_run_writes_is_listed(file, kind):
    assert list(table(METRICS, f"## {file}")) == [field.name for field in dataclasses.fields(kind)]


def test_what_is_said_of_a_source_is_listed():
    (cell,) = (line for line in METRICS.splitlines() if line.startswith("| `sources`"))
    assert re.findall(r"`(\w+)`", cell.split("|")[3]) == [field.name for field in dataclasses.fields(Score)]


def test_every_field_of_the_split_is_listed():
    fields = table((ROOT / "docs/tracing.md").read_text(), "## The split of a step")
    listed = [name for cell in fields for name in re.findall(r"\w+", cell)]
    assert listed == [field.name for field in dataclasses.fields(StepSplit)]


def test_every_field_of_a_runs_facts_is_listed():
    listed = table((ROOT / "docs/reports.md").read_text(), "## run.json")
    assert list(listed) == [field.name for field in dataclasses.fields(RunFacts)]


FORMAT = (ROOT / "docs/checkpoint-format.md").read_text()


def test_every_key_of_the_manifest_is_listed():
    listed = [key for cell in table(FORMAT, "The checksum is the SHA-256") for key in re.findall(r"\w+", cell)]
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(Manifest))


def test_a_checkpoint_is_read_without_horizon_as_the_format_says(tmp_path, monkeypatch, capsys):
    with build() as engine:
        train(engine, 1, 3)
        engine.save_checkpoint(tmp_path / "checkpoint").wait()
        masters = dict(engine.named_master_parameters())
    monkeypatch.chdir(tmp_path)
    (script,) = fenced("python", FORMAT)
    assert "horizon" not in "".join(line for line in script.splitlines() if "import" in line)
    names = {}
    exec(compile(script, "checkpoint-format.md", "exec"), names)
    assert capsys.readouterr().out.startswith("LlamaForCausalLM after 3 steps\n")
    for name, value in masters.items():
        assert torch.equal(torch.from_numpy(names["read"](name)).view(torch.int32), value.view(torch.int32))


def test_a_chunk_is_laid_out_as_the_format_says(tmp_path):
    with build() as engine:
        train(engine, 1, 2)
        engine.save_checkpoint(tmp_path / "checkpoint").wait()
        value = dict(engine.named_master_parameters())["lm_head.weight"]
    content = (tmp_path / "checkpoint/arrays/lm_head.weight/master/c.0.0").read_bytes()
    assert content[:-4] == value.numpy().astype("<f4").tobytes()
    assert int.from_bytes(content[-4:], "little") == crc32c(content[:-4])


def crc32c(content):
    """The definition: reflected polynomial 0x82F63B78, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def commands():
    for page in PAGES:
        for block in fenced("bash", page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if (
                    words[:1] == ["horizon"]
                    and words[1] in ("train", "check", "plan", "data")
                    and "--config-dir" not in words
                ):
                    yield pytest.param(words[2:], id=f"{page.name}: {' '.join(words)}")


@pytest.mark.parametrize("words", list(commands()))
def test_the_settings_in_every_command_exist(words):
    overrides = [word for word in words if "=" in word and not word.startswith("machine=")]
    pairs = (word.split("=", 1) for word in overrides)
    compose([f"{key}={value if value.startswith('[') else value.split(',')[0]}" for key, value in pairs])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_that_are_named_exist(page):
    for named in re.findall(r"(?<![\w/.-])(?:profiling|examples)/[\w/]+\.py", page.read_text()):
        assert (ROOT / named).exists(), named


def test_the_readme_names_the_architectures_that_the_tests_train():
    listed = re.search(r"Trained in the tests.*?:(.*?)\n\n", README, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", listed)) == {family.split(",")[0] for family in FAMILIES}


def test_the_scripts_on_generation_run(tmp_path, monkeypatch, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "my-model")
    reference.build("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    generates, scores = fenced("python", (ROOT / "docs/generation-and-evaluation.md").read_text())
    names = {}
    exec(compile(generates, "generates", "exec"), names)
    assert names["tokens"].shape == (2, len("Once upon a time") + 16)
    names["batches"] = [reference.plain(0), reference.plain(1)]
    names["sources"] = ["first", "first", "second", "second"]
    with InferenceEngine.from_pretrained("my-model") as engine:
        exec(compile(scores, "scores", "exec"), names | {"engine": engine})
    assert "first 22 " in capsys.readouterr().out


def test_the_readmes_script_runs(tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "my-model")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "my-model")
    (tmp_path / "my-text.txt").write_text("some text to learn from\n" * 400)
    monkeypatch.chdir(tmp_path)
    (script,) = fenced("python", README)
    exec(compile(script, "README.md", "exec"), {})
    assert len(re.findall(r"loss \d\.\d{3}, gradient norm", capsys.readouterr().out)) == 3
    before, after = (AutoModelForCausalLM.from_pretrained(name) for name in ("my-model", "my-model-tuned"))
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_the_script_on_adapters_runs(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    reference.build("llama").save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    (script,) = fenced("python", (ROOT / "docs/adapters.md").read_text())
    names = {"rows": reference.plain(0)["input_ids"]}
    exec(compile(script, "adapters.md", "exec"), names)
    assert names["tuned"].active_adapter == "default"
