from dataclasses import replace

import pytest

from horizon import runtime
from horizon.units import MIB


@pytest.fixture(scope="module", autouse=True)
def small_head_chunks():
    """Measuring a full chunk of the head takes gigabytes with tiny vocabularies; here chunks are small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "HEAD_CHUNK_BYTES", 8 * MIB)
        yield


@pytest.fixture
def offload_everything(monkeypatch):
    """Have every boundary go to the host, whatever the device has room for."""
    plan_activations = runtime.plan_activations

    def offloaded(plan, *args, **kwargs):
        return replace(plan_activations(plan, *args, **kwargs), offloaded=frozenset(range(1, plan.num_blocks - 1)))

    return lambda: monkeypatch.setattr(runtime, "plan_activations", offloaded)
