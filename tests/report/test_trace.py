"""The trace file has the documented lanes, and nothing of the timeline is lost on the way into it."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import horizon
from horizon.errors import ConfigError, HorizonError
from horizon.report.trace import draw_step, lanes, require_matplotlib, write_trace
from horizon.stream.timeline import Cause
from tests.stream.simulated import Durations, simulate
from tests.stream.steps import tiny_model

SHAPE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
BATCH = {"input_ids": torch.arange(32).view(2, 16), "labels": torch.arange(32).view(2, 16)}


@pytest.fixture(scope="module")
def engine():
    with horizon.Engine.from_config(SHAPE, device="cpu", self_check=False) as engine:
        engine.step(BATCH)
        yield engine


@pytest.fixture(scope="module")
def recorded(engine, tmp_path_factory):
    """(recording, trace events) of two steps."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    with engine.trace(path) as recording:
        engine.step(BATCH), engine.step([BATCH, BATCH])
    return recording, json.loads(path.read_text())["traceEvents"]


def names_of_lanes(events):
    return {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}


def bars(events, lane):
    names = names_of_lanes(events)
    return [e for e in events if e["ph"] == "X" and names[e["tid"]] == lane]


def test_the_lanes_are_those_of_the_documents(recorded):
    recording, events = recorded
    page = (Path(__file__).parents[2] / "docs/tracing.md").read_text()
    documented = re.findall(
        r"`([\w ]+)`", "".join(re.findall(r"^\| (`.*?) \|", page[: page.index("## What comp")], re.M))
    )
    found = list(names_of_lanes(events).values())
    # as many threads as there are, and blocks in HBM or states on nvme if there are any
    varying = {"update 0", "update 1", "HBM update", "disk 0", "disk 1"}
    assert set(found) - varying == set(documented) - varying
    assert [name for name in found if name.startswith("update")]
    assert found == ["step", *lanes(recording.steps)]
    assert [e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"] == list(range(len(found)))


def test_every_span_is_a_bar_with_its_times_and_bytes(recorded):
    recording, events = recorded
    for lane in lanes(recording.steps):
        spans = [span for step in recording.steps for span in step.lane(lane)]
        found = bars(events, lane)
        assert [e["ts"] for e in found] == [pytest.approx(span.start * 1e6) for span in spans]
        assert [e["dur"] for e in found] == [pytest.approx(span.seconds * 1e6) for span in spans]
        assert [e["args"].get("bytes", 0) for e in found] == [span.num_bytes for span in spans]
        assert all(e["dur"] >= 0 and e["pid"] == 0 and e["cat"] for e in found)
    assert [e["name"] for e in bars(events, "step")] == ["recorded step 1", "recorded step 2"]


def test_bars_say_what_and_which_block(recorded):
    _, events = recorded
    visits = dict.fromkeys(e["name"] for e in bars(events, "compute") if e["cat"] == "arithmetic")
    forward = ["forward embed", "forward layers.0", "forward layers.1", "head head"]
    assert list(visits) == [*forward, "backward layers.1", "backward layers.0", "backward embed"]
    gaps = {e["name"] for e in bars(events, "compute") if e["cat"] != "arithmetic"}
    assert {"data: between steps", "link: weights of layers.0", "launch: issuing"} <= gaps
    assert all(name.split(":")[0] in Cause.__members__ for name in gaps)
    assert {"weights embed", "weights layers.0"} <= {e["name"] for e in bars(events, "H2D")}
    assert {"gradient layers.1"} <= {e["name"] for e in bars(events, "D2H")}


def test_every_wait_of_a_step_has_a_name(tmp_path):
    step, _ = simulate(tiny_model(), Durations(data=3, issue=1, published={0: 50}), offloaded=(3,))
    write_trace([step], [layout.name for layout in tiny_model().layouts], tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    found = {e["name"] for e in bars(events, "compute")}
    assert {"optimizer: update of embed", "optimizer: weights of embed", "link: last gradient"} <= found


def test_a_step_is_drawn(recorded, tmp_path):
    recording, _ = recorded
    draw_step(recording.steps[0], tmp_path / "step.png")
    header = (tmp_path / "step.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") > 1000  # pixels wide


def test_a_picture_without_matplotlib_is_refused_before_anything_is_recorded(engine, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"matplotlib, which is not installed: pip install 'horizon\[report\]'"):
        require_matplotlib()
    with pytest.raises(ConfigError, match="matplotlib"), engine.trace(picture=tmp_path / "step.png"):
        pytest.fail("it began")
    with engine.trace(tmp_path / "trace.json"):
        engine.step(BATCH)
    assert (tmp_path / "trace.json").exists()


def test_a_recording_that_fails_writes_nothing_and_the_next_one_works(engine, tmp_path):
    path = tmp_path / "trace.json"
    with pytest.raises(KeyError), engine.trace(path):
        engine.step(BATCH)
        raise KeyError
    with pytest.raises(HorizonError, match="no step ended"), engine.trace(path):
        engine.evaluate(BATCH)
    with engine.trace():
        engine.step(BATCH)
        with pytest.raises(HorizonError, match="recorded already"), engine.trace(path):
            pytest.fail("it began")
    assert not path.exists()
    with engine.trace(path) as recording:
        engine.forward_backward(BATCH), engine.forward_backward(BATCH), engine.optimizer_step()
    assert len(recording.steps) == 1 and path.exists()


def test_recording_changes_no_bit():
    masters = []
    for traced in (False, True):
        with horizon.Engine.from_config(SHAPE, device="cpu", self_check=False, seed=3) as engine:
            if traced:
                with engine.trace():
                    engine.step(BATCH), engine.step(BATCH)
            else:
                engine.step(BATCH), engine.step(BATCH)
            masters.append(dict(engine.named_master_parameters()))
    assert all(torch.equal(masters[0][name], masters[1][name]) for name in masters[0])
