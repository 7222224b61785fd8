"""What is measured for a prediction is finite, complete, and leaves no trace; how long it took is not looked at."""

import math

import pytest
import torch

import horizon
from horizon.config.schema import Recompute
from horizon.optim.rate import measure_rates
from horizon.store.arena import Arena
from horizon.stream.passes import Passes
from horizon.stream.streams import Streams
from horizon.stream.timing import measure_copies

pytestmark = pytest.mark.timeout(120)

CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def make(tied=False, recompute="auto", hbm_blocks=0, **settings):
    memory = horizon.MemoryConfig(
        recompute=recompute, policy="hbm_first" if hbm_blocks else "auto", hbm_blocks=hbm_blocks
    )
    config = {**CONFIG, "tie_word_embeddings": tied}
    return horizon.Engine.from_config(config, device="cpu", memory=memory, self_check=False, **settings)


def batch(rows=4, tokens=16, seed=0):
    ids = torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": part, "labels": part} for part in ids.split(2)]


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize("recompute", ["full", "selective", "none"])
@pytest.mark.parametrize("freeze", [(), ("model.embed_tokens.*", "model.layers.0.*"), ("model.layers.1.*",)])
def test_an_engine_predicts_the_steps_it_has_planned(max_grad_norm, recompute, freeze):
    with make(recompute=recompute, max_grad_norm=max_grad_norm, freeze=freeze) as engine:
        assert engine.plan.prediction is None
        assert engine.plan_micro_batch(4, 16, 2) == 2
        found = engine.plan.prediction
    parts = (found.arithmetic_s, found.link_s, found.optimizer_s, found.launch_s)
    assert found.num_tokens == 64
    assert all(math.isfinite(part) and part >= 0 for part in parts)
    assert found.arithmetic_s > 0
    assert found.seconds == pytest.approx(sum(parts))
    assert found.tokens_per_s == pytest.approx(64 / found.seconds)
    assert found.bound in ("arithmetic", "link", "host memory bandwidth", "launches")


def test_every_kind_of_layer_is_timed_with_what_the_plan_keeps(monkeypatch):
    kept, forward = [], Passes.forward

    def recorded(self, key, params, hidden, call, sums, recompute):
        kept.append(recompute)
        return forward(self, key, params, hidden, call, sums, recompute)

    monkeypatch.setattr(Passes, "forward", recorded)
    with make(freeze=("model.layers.1.*",)) as engine:
        executor = engine._runtime.executor
        times = engine._runtime.guarded(
            lambda: executor.time_passes(engine._prepare(batch()[0], True)[0], 0, [*Recompute][1:], alone=False)
        )
        layouts = engine._runtime.model.layouts
    assert times.num_tokens == 32
    assert set(kept) == set([*Recompute][1:])
    sizes = {(lay.num_elements, lay.num_trainable) for lay in layouts[1:-1]}
    assert len(sizes) == 2
    assert times.layers.keys() == {(*size, kind) for size in sizes for kind in [*Recompute][1:]}
    seconds = [times.head_s, times.embedding.forward_s, times.embedding.backward_s]
    seconds += [s for passes in times.layers.values() for s in (passes.forward_s, passes.backward_s)]
    assert all(s > 0 for s in seconds)


def run(plans, tied, max_grad_norm, hbm_blocks):
    """Losses, norms and weights of steps with or without plans made in between."""
    found = []
    with make(tied, "none", hbm_blocks, max_grad_norm=max_grad_norm) as engine:
        for seed in range(2):
            if plans:
                engine.plan_micro_batch(4, 16, 2)
            result = engine.step(batch(seed=seed))
            found += [result.loss, result.grad_norm]
        engine.forward_backward(batch(seed=2))
        if plans:
            engine.plan_micro_batch(2, 16, 2)
        gradients = dict(engine.named_gradients())
        engine.forward_backward(batch(seed=3))
        if plans:
            engine.plan_micro_batch(4, 16, 1)
        found.append(engine.optimizer_step().grad_norm)
        return found, gradients, dict(engine.named_master_parameters())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_grad_norm", [0.5, None])
@pytest.mark.parametrize("hbm_blocks", [0, 2, 5])
def test_measuring_changes_nothing(tied, max_grad_norm, hbm_blocks):
    """Nor does it take a buffer of the ring, of which there are fewer than blocks in HBM."""
    plain, measured = (run(plans, tied, max_grad_norm, hbm_blocks) for plans in (False, True))
    assert measured[0] == plain[0]
    for expected, found in zip(plain[1:], measured[1:], strict=True):
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_steps_of_a_run_are_not_measured(monkeypatch):
    with make() as engine:
        engine.plan_micro_batch(4, 16, 2)
        expected = engine.plan.prediction
        monkeypatch.setattr("horizon.stream.timing.PassTimer.visit", None)
        engine.plan_micro_batch(4, 16, 2)  # of a shape that was timed
        engine.step(batch(tokens=8))  # of another shape, and not timed for that
        assert engine.plan.prediction is None
        engine.step(batch())
        assert engine.plan.prediction == expected


def test_no_room_to_measure_means_no_prediction(monkeypatch, caplog):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("no room\nat all")

    monkeypatch.setattr("horizon.stream.timing.PassTimer.visit", full)
    with make() as engine:
        assert engine.plan_micro_batch(4, 16, 2) == 2
        assert engine.plan.prediction is None
        assert "no prediction of the step's time: no room" in caplog.text
        assert math.isfinite(engine.step(batch()).loss)


def test_rates_are_measured_once_and_give_their_memory_back(monkeypatch):
    arenas, map_all = [], Arena.__init__

    def counted(self, *args):
        arenas.append(self)
        map_all(self, *args)

    monkeypatch.setattr(Arena, "__init__", counted)
    device, optimizer = torch.device("cpu"), horizon.AdamW(lr=0.123)
    rates = measure_rates(device, 2, torch.bfloat16, optimizer)
    assert min(rates.up_bytes_per_s, rates.down_bytes_per_s, rates.device_bytes_per_s, rates.updates_per_s) > 0
    assert not rates.overlaps
    assert len(arenas) == 1 + 4 + 1
    assert all(not arena.regions and not arena._mappings for arena in arenas)
    assert measure_rates(device, 2, torch.bfloat16, optimizer) is rates
    assert len(measure_copies(Streams.on(device))) == 3
