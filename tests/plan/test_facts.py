"""Machine files: the ones that Horizon brings along, what is left out of one, and what is refused."""

import re
from pathlib import Path

import pytest

from horizon.config.compose import load_machine, machine_names
from horizon.config.machine import TierFile
from horizon.config.schema import Moments
from horizon.errors import ConfigError
from horizon.plan.facts import read_facts
from tests.forecast.conftest import machine

FOLDER = Path(__file__).parents[2] / "conf/machine"


@pytest.mark.parametrize("name", machine_names())
def test_every_machine_reads_and_says_of_each_number_where_it_is_from(name):
    facts = read_facts(load_machine(name), name)
    assert facts.device is not None and facts.device.num_bytes > 1 << 32
    assert 1e12 < facts.device.flops_per_s < 2e15 and 1e9 < facts.device.up_bytes_per_s < 1e11
    for line in (FOLDER / f"{name}.yaml").read_text().splitlines():
        if re.match(r"\s+\w+: [\d.]", line):
            assert re.search(r"# (measured|datasheet|estimate)", line), line


def test_updates_that_are_not_given_follow_from_the_hosts_bandwidth():
    file = machine()
    file.updates_g_s = {"bfloat16": 7.0}
    facts = read_facts(file, "a test")
    assert facts.updates_per_s[Moments.float32] == pytest.approx(100e9 / 26)
    assert facts.updates_per_s[Moments.bfloat16] == 7e9
    assert facts.updates_per_s[Moments.int8] == pytest.approx(100e9 / 18)  # arithmetic bounds it, not memory


def test_fewer_threads_update_more_slowly_as_was_measured():
    facts = read_facts(machine(), "a test")  # 9 cores: 8 threads by default
    full = facts.update_rate(Moments.float32, None)
    assert facts.update_rate(Moments.float32, 8) == facts.update_rate(Moments.float32, 20) == full
    # 4, 8 and 16 threads of one machine: 2.70, 4.17 and 5.03 billion a second
    assert facts.update_rate(Moments.float32, 4) / full == pytest.approx(4.17 / 5.03, rel=0.1)
    assert facts.update_rate(Moments.float32, 2) / full == pytest.approx(2.70 / 5.03, rel=0.1)


def test_the_fewest_threads_that_are_as_fast_as_any_are_the_default():
    file = machine()
    file.updates_g_s = {"float32": 5.0, "bfloat16": 6.0}
    file.updates_by_threads_g_s = {2: 2.5, 4: 4.9, 6: 5.0, 8: 4.0}
    facts = read_facts(file, "a test")
    assert facts.update_threads == 4  # 2 % from the best
    assert facts.update_rate(Moments.float32, None) == facts.update_rate(Moments.float32, 4) == 5e9
    assert facts.update_rate(Moments.bfloat16, 2) == pytest.approx(6e9 * 2.5 / 4.9)
    assert facts.update_rate(Moments.bfloat16, 8) == pytest.approx(6e9 * 4.0 / 4.9)
    file.updates_by_threads_g_s = {2: 2.5, 4: 4.8, 6: 5.0}
    assert read_facts(file, "a test").update_threads == 6
    assert read_facts(machine(), "a test").update_threads == 8  # not measured: all of 9 cores but one


def test_tiers_are_read():
    file = machine()
    file.tiers = {"nvme": TierFile(memory="1TiB", read_gb_s=2.3, write_gb_s=2.7)}
    tier = read_facts(file, "a test").tiers["nvme"]
    assert (tier.num_bytes, tier.read_bytes_per_s, tier.write_bytes_per_s) == (1 << 40, 2.3e9, 2.7e9)


def test_what_cannot_be_is_refused_by_its_key():
    file = machine()
    file.host.cores = 0
    with pytest.raises(ConfigError, match=r"host\.cores=0 of the machine must be positive"):
        read_facts(file, "a test")
    file = machine()
    file.device.up_gb_s = -1.0
    with pytest.raises(ConfigError, match=r"device\.up_gb_s=-1\.0"):
        read_facts(file, "a test")
    for wrong in ({4: 0.0}, {0: 1.0}):
        file = machine()
        file.updates_by_threads_g_s = wrong
        with pytest.raises(ConfigError, match=r"updates_by_threads_g_s.* of the machine must be positive"):
            read_facts(file, "a test")
    file = machine()
    file.updates_g_s = {"fp8": 1.0}
    with pytest.raises(ConfigError, match="updates_g_s='fp8': expected one of float32"):
        read_facts(file, "a test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nhost: {memory: 1GiB, cores: 2, bandwidth_gb_s: 3}\n", "host.matmul_tflops"),
        ("name: x\nhots: {}\n", "hots is no setting; did you mean host"),
        ("name: x\nhost: {memory: 1GiB, cores: two}\n", "host.cores"),
        ("a: [1\n", "machine="),
    ],
    ids=["a missing number", "a wrong key", "a wrong type", "no yaml"],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_facts(load_machine(str(tmp_path / "my.yaml")), "a test")


def test_a_machine_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"machine=h300: no such file; .*h100, h200, laptop, workstation"):
        load_machine("h300")
