from dataclasses import replace

import pytest

from horizon import runtime
from horizon.stream.activations import Activations
from horizon.units import MIB


@pytest.fixture(scope="module", autouse=True)
def small_head_chunks():
    """Measuring a full chunk of the head takes gigabytes with tiny vocabularies; here chunks are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "HEAD_CHUNK_BYTES", 8 * MIB)
        yield


@pytest.fixture
def offload_everything(monkeypatch):
    """Have every boundary go to the host and nothing else be kept, whatever the device has room for."""
    plan = Activations.plan

    def offloaded(self, fixed, *args, **kwargs):
        layers = frozenset(range(1, fixed.num_blocks - 1))
        return replace(plan(self, fixed, *args, **kwargs), offloaded=layers, recompute={})

    return lambda: monkeypatch.setattr(Activations, "plan", offloaded)
