"""conf/ composed onto the schema: defaults, the keys scripts rely on, and errors that name the key."""

import dataclasses
from pathlib import Path

import pytest

from horizon.config.compose import compose, conf_dir
from horizon.config.schema import ComputeDtype, DataFormat, HorizonConfig, LrSchedule, Moments, Tier, TierRule
from horizon.errors import ConfigError

FILES = [path for path in conf_dir().glob("*/*.yaml") if path.parent.name != "machine"]  # those are not a run's
OPTIONS = sorted(path.relative_to(conf_dir()).with_suffix("") for path in FILES)


def test_conf_says_the_same_defaults_as_the_schema():
    composed = compose([])
    assert composed.model.config["model_type"] == "llama"
    composed.model.config = {}
    assert composed == HorizonConfig()


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_group_option_composes(option: Path):
    config = compose([f"{option.parent}={option.name}"])
    group = getattr(config, option.parent.name)
    assert dataclasses.is_dataclass(group)
    if option.parent.name == "data":
        assert group.format == DataFormat[option.name]


def test_rules_of_tiers_are_typed():
    overrides = ['memory.rules=[{state: "exp_avg*", blocks: "1-4,head", tier: nvme}, {tier: dram}]']
    first = TierRule(state="exp_avg*", blocks="1-4,head", tier=Tier.nvme)
    assert compose(overrides).memory.rules == [first, TierRule()]
    for wrong in ("{tier: disk}", "{states: weights}"):
        with pytest.raises(ConfigError, match=r"tier: Invalid value|states is no setting"):
            compose([f"memory.rules=[{wrong}]"])


def test_the_keys_that_scripts_rely_on():
    config = compose(
        [
            "model.path=some/folder",
            "data=text",
            "data.path=texts",
            "optim=adamw",
            "optim.lr=1e-3",
            "optim.schedule=linear",
            "optim.moments=int8",
            "train.steps=7",
            "train.batch_size=4",
            "train.seq_len=128",
            "train.micro_batch=2",
            "memory.host_budget=24GiB",
            "memory.device_budget=auto",
            "compute_dtype=bfloat16",
            "seed=5",
        ]
    )
    assert (config.model.path, config.data.format, config.data.path) == ("some/folder", DataFormat.text, "texts")
    assert (config.optim.lr, config.optim.schedule, config.optim.moments) == (1e-3, LrSchedule.linear, Moments.int8)
    assert (config.train.steps, config.train.batch_size, config.train.seq_len, config.train.micro_batch) == (
        7,
        4,
        128,
        2,
    )
    assert (config.memory.host_budget, config.memory.device_budget) == ("24GiB", "auto")
    assert (config.compute_dtype, config.seed) == (ComputeDtype.bfloat16, 5)


def test_a_path_replaces_the_preset_model():
    assert compose(["model.path=folder"]).model.config == {}
    assert compose(["model=hf", "model.path=folder"]).model == compose(["model.path=folder"]).model


def test_model_config_takes_the_keys_of_any_architecture():
    config = compose(["model.config.hidden_size=64", "+model.config.attention_bias=true"]).model.config
    assert (config["hidden_size"], config["attention_bias"]) == (64, True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim.lrr is no setting; did you mean optim.lr?"),
        ("optimm=3", "optimm is no setting; did you mean optim?"),
        ("+optim.foo=1", "optim.foo is no setting; optim has name, lr, "),
        ("+foo=1", "foo is no setting; the top level has model, data, "),
        ("model.config.attention_bias=true", r"to add it to what is there, write \+model.config.attention_bias=..."),
        ("train.steps=abc", "train.steps: Value 'abc' of type 'str' could not be converted to Integer"),
        ("optim.moments=fp8", r"optim.moments: Invalid value 'fp8', expected one of \[float32, bfloat16, int8\]"),
        ("optim.max_grad_norm=high", "optim.max_grad_norm: .*could not be converted to Float"),
        ("data.format=csv", r"data.format: Invalid value 'csv', expected one of \[auto, python_stdlib, text, "),
        ("train.steps=null", "train.steps: field 'train.steps' is not Optional"),
        ("optim=sgd", "Could not find 'optim/sgd'; Available options in 'optim': adamw; mezo"),
        ("a=[", "no viable alternative"),
    ],
)
def test_a_wrong_setting_is_named_on_one_line(override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compose([override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["model.config.hidden_size=64", "+model.config.attention_bias=true"])
def test_a_path_beside_keys_of_a_config_is_refused(override):
    with pytest.raises(ConfigError, match=r"has no use beside model\.path=folder"):
        compose(["model.path=folder", override])


def test_tokens_of_a_step_become_rows():
    assert compose(["train.tokens_per_step=1000", "train.seq_len=256"]).train.batch_size == 3
    assert compose(["train.tokens_per_step=256", "train.batch_size=9"]).train.batch_size == 1
    with pytest.raises(ConfigError, match=r"train\.tokens_per_step=255 is less than a row of train\.seq_len=256"):
        compose(["train.tokens_per_step=255"])
    with pytest.raises(ConfigError, match=r"train\.tokens_per_step .* data\.packing=false"):
        compose(["train.tokens_per_step=1000", "data.packing=false"])
