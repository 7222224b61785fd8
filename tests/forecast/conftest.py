"""A machine with round numbers, and small models to plan for."""

import pytest

from horizon.config.machine import DeviceFile, HostFile, MachineFile
from horizon.config.schema import HorizonConfig
from horizon.forecast.imagined import Forecaster
from horizon.forecast.machine import target_of
from horizon.forecast.shapes import open_shape
from horizon.plan.facts import read_facts

SMALL = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def machine(host="64GiB", device="16GiB"):
    gpu = DeviceFile(name="gpu", memory=device, matmul_tflops=100, bandwidth_gb_s=1000, up_gb_s=25, down_gb_s=25)
    parts = HostFile(memory=host, cores=9, bandwidth_gb_s=100, matmul_tflops=1)
    return MachineFile(name="test", host=parts, device=gpu if device else None)


def settings(model=None, **changes):
    """Defaults, but for `model.config` and `section__name=value`."""
    config = HorizonConfig()
    config.model.config = dict(model or SMALL)
    config.train.seq_len = 128
    for key, value in changes.items():
        section, _, name = key.partition("__")
        setattr(getattr(config, section), name, value)
    return config


@pytest.fixture(scope="session")
def forecaster():
    """Makes a forecaster for a model on a machine; a model is opened once."""
    opened = {}

    def make(config, file=None, overhead=0):
        key = tuple(sorted((k, str(v)) for k, v in config.model.config.items()))
        opened.setdefault(key, open_shape(config))
        facts = read_facts(file or machine(), "a test")
        return Forecaster(opened[key], target_of(facts, "auto", False, overhead))

    return make
