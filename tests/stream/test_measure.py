"""What happens where a budget has no room to be measured with many rows; the measuring itself needs a device."""

import weakref
from types import SimpleNamespace

import torch

from horizon.config.schema import Recompute
from horizon.stream import measure


def test_what_a_failed_measurement_had_allocated_is_gone_before_the_next(monkeypatch):
    allocated, resets = [], []

    def measured(executor, rows, seq_len, version):
        if rows > 1:
            activations = torch.zeros(8)
            allocated.append(weakref.ref(activations))
            raise torch.cuda.OutOfMemoryError("no room")
        assert [found() for found in allocated] == [None]
        assert resets == [True]
        return 1, 2, 3

    monkeypatch.setattr(measure, "_measure", measured)
    monkeypatch.setattr(measure, "_kept", lambda *args: (4, 5))
    executor = SimpleNamespace(device=torch.device("cuda"), reset=lambda: resets.append(True))
    found = measure.measure_working_set(executor, 16, 4, 0, Recompute.auto)
    assert (found.base, found.per_token, found.least) == (1, 2, 3)
    assert (found.kept_selective, found.kept_none) == (4, 5)
