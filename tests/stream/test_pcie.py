"""What is asked of the driver, through a stand-in for its library."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from horizon.stream import pcie
from horizon.stream.pcie import PcieLink, nvml, pcie_link


class Refused(Exception):
    pass


def library(**more):
    calls = {
        "NVMLError": Refused,
        "nvmlDeviceGetHandleByUUID": lambda uuid: {"GPU-1-2": 7}[uuid],
        "nvmlDeviceGetMaxPcieLinkGeneration": lambda handle: 5,
        "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 8,
        "nvmlDeviceGetMaxPcieLinkWidth": lambda handle: 16,
        "nvmlDeviceGetPciInfo": lambda handle: SimpleNamespace(busId="00000000:3B:00.0"),
    }
    return SimpleNamespace(**calls | more)


@pytest.fixture
def driver(monkeypatch):
    def install(found):
        @contextmanager
        def opened():
            yield found

        monkeypatch.setattr(pcie, "nvml", opened)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="1-2"))

    return install


@pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("-1\n", None), (None, None)])
def test_the_link_of_the_card_that_torch_sees_first(driver, tmp_path, text, node):
    driver(library())
    if text is not None:
        (tmp_path / "0000:3b:00.0").mkdir()
        (tmp_path / "0000:3b:00.0" / "numa_node").write_text(text)
    assert pcie_link(tmp_path) == PcieLink(5, 8, 16, node)


def test_without_a_driver_or_an_answer_there_is_none(driver, tmp_path):
    driver(None)
    assert pcie_link(tmp_path) is None

    def refuse(handle):
        raise Refused

    driver(library(nvmlDeviceGetMaxPcieLinkWidth=refuse))
    assert pcie_link(tmp_path) is None


def test_a_machine_without_a_driver_has_no_library():
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    with nvml() as found:
        assert found is None


def test_what_lanes_carry():
    assert PcieLink(5, 16, 16, None).gb_per_s == pytest.approx(63.0, abs=0.1)
    assert PcieLink(9, 16, 16, None).gb_per_s == 0
    assert str(PcieLink(4, 16, 16, 0)) == "PCIe generation 4, 16 lanes, next to NUMA node 0"
