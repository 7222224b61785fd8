"""A run that was interrupted and the one that was not are the same run, bit for bit."""

import math
import threading

import pytest
import torch

import horizon
from horizon.checkpoint.snapshot import Snapshot
from horizon.errors import CheckpointError, HorizonError
from tests.checkpoint.engines import DROPOUT, LLAMA, build, equal, load, make_batch, states, train

SETTINGS = {
    "exact": {},
    "no clipping": {"max_grad_norm": None},
    "always clipped": {"max_grad_norm": 0.3},
    "speculative": {"clip": "speculative", "max_grad_norm": 9.0},  # what it corrects depends on the threads' timing
    "lagged": {"clip": "lagged", "max_grad_norm": 0.7},
    "bf16 moments": {"optimizer": horizon.AdamW(lr=1e-2, moments="bfloat16")},
    "int8 moments": {"optimizer": horizon.AdamW(lr=1e-2, moments="int8")},
    "bf16 masters": {"optimizer": horizon.AdamW(lr=1e-2, master="bf16_stochastic")},
    "bf16 masters, int8 moments": {
        "optimizer": horizon.AdamW(lr=1e-2, master="bf16_stochastic", moments="int8"),
        "max_grad_norm": None,
        "seed": 7,
    },
    "in hbm": {"memory": horizon.MemoryConfig(hbm_blocks=3)},
    "in hbm, no clipping": {"memory": horizon.MemoryConfig(hbm_blocks=3), "max_grad_norm": None},
    "frozen": {"freeze": ["model.embed_tokens.*", "*.q_proj.weight"]},
    "bf16 compute": {"compute_dtype": "bfloat16"},
    "dropout": {"model": DROPOUT},
    "eager attention": {"model": {**LLAMA, "attn_implementation": "eager"}, "compute_dtype": "bfloat16"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_goes_on_as_if_nothing_had_happened(settings, tmp_path):
    settings = {"optimizer": horizon.AdamW(lr=1e-2), **settings}
    with build(**settings) as engine:
        train(engine, 1, 2)
        save = engine.save_checkpoint(tmp_path / "saved", run={"rows": 4})
        expected = train(engine, 3, 5)  # while it is written
        save.wait()
        assert engine.num_steps == 5
        final = states(engine)
    keywords = {key: value for key, value in settings.items() if key != "model"}
    with load(tmp_path / "saved", **keywords) as engine:
        assert engine.num_steps == 2
        assert train(engine, 3, 5) == expected
        assert equal(states(engine), final)


@pytest.mark.parametrize("max_grad_norm", [1.0, None], ids=["exact", "no clipping"])
@pytest.mark.parametrize("hbm_blocks", [0, 2, 5])
def test_every_block_is_set_aside_by_its_update_where_no_thread_comes_first(
    tmp_path, monkeypatch, hbm_blocks, max_grad_norm
):
    copy_all, trained = Snapshot.copy_all, threading.Event()

    def late(snapshot, num_threads):
        trained.wait(30)
        copy_all(snapshot, num_threads)

    memory = horizon.MemoryConfig(hbm_blocks=hbm_blocks)
    with build(optimizer=horizon.AdamW(lr=1e-2), memory=memory, max_grad_norm=max_grad_norm) as engine:
        train(engine, 1, 2)
        expected = states(engine)
        monkeypatch.setattr(Snapshot, "copy_all", late)
        save = engine.save_checkpoint(tmp_path / "saved")
        train(engine, 3, 4)
        trained.set()
        save.wait()
    with load(tmp_path / "saved", optimizer=horizon.AdamW(lr=1e-2)) as engine:
        assert engine.num_steps == 2
        assert equal(states(engine), expected)


def test_a_live_engine_goes_back_and_on_again(tmp_path):
    with build() as engine:
        train(engine, 1, 2)
        engine.save_checkpoint(tmp_path / "saved", run={"rows": 4}).wait()
        expected = train(engine, 3, 6)
        final = states(engine)
        assert engine.restore(tmp_path / "saved") == {"rows": 4}
        assert engine.num_steps == 2
        assert train(engine, 3, 6) == expected
        assert equal(states(engine), final)


def test_weights_alone_find_no_moments_left_of_an_engine_that_trained(tmp_path):
    with build() as engine:
        engine.save_checkpoint(tmp_path / "saved").wait()
        expected, final = train(engine, 1, 2), states(engine)
        engine.restore(tmp_path / "saved", weights_only=True)
        assert all(not tensor.any() for (_, name), tensor in states(engine).items() if name.startswith("exp_avg"))
        assert train(engine, 1, 2) == expected
        assert equal(states(engine), final)


def test_accumulated_and_micro_batched_steps_go_on(tmp_path):
    batches = [make_batch(1), make_batch(2, rows=1), make_batch(3, tokens=9)]

    def steps(engine):
        losses = [engine.step(batches).loss]
        losses += [engine.forward_backward(batch) for batch in batches]
        return [*losses, engine.optimizer_step().loss]

    with build(DROPOUT) as engine:
        steps(engine)
        engine.save_checkpoint(tmp_path / "saved").wait()
        expected, final = steps(engine), states(engine)
    with load(tmp_path / "saved") as engine:
        assert steps(engine) == expected
        assert equal(states(engine), final)


def test_a_skipped_step_counts_for_dropout_but_not_for_the_optimizer(tmp_path):
    def bad(logits, batch):
        return logits.sum() * math.nan

    with build(DROPOUT, on_nonfinite="skip") as engine:
        train(engine, 1, 2)
        assert engine.step(make_batch(9), bad).skipped
        engine.save_checkpoint(tmp_path / "saved").wait()
        expected, final = train(engine, 3, 5), states(engine)
    with load(tmp_path / "saved", on_nonfinite="skip") as engine:
        assert engine.num_steps == 2
        assert train(engine, 3, 5) == expected
        assert equal(states(engine), final)


def test_gradients_that_wait_are_not_saved(tmp_path):
    with build() as engine:
        engine.forward_backward(make_batch(1))
        with pytest.raises(HorizonError, match=r"save_checkpoint while gradients .* wait; call optimizer_step first"):
            engine.save_checkpoint(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()


# ---- elsewhere


@pytest.mark.parametrize("before", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("after", ["float32", "bfloat16", "int8"])
def test_moments_may_be_kept_in_another_format(tmp_path, before, after):
    with build(optimizer=horizon.AdamW(lr=1e-2, moments=before)) as engine:
        train(engine, 1, 4)
        engine.save_checkpoint(tmp_path / "saved").wait()
        masters, expected = dict(engine.named_master_parameters()), train(engine, 5, 7)
    with load(tmp_path / "saved", optimizer=horizon.AdamW(lr=1e-2, moments=after)) as engine:
        assert equal(dict(engine.named_master_parameters()), masters)
        found = train(engine, 5, 7)
    assert found[0][:2] == expected[0][:2]  # of the same weights
    for one, other in zip(found, expected, strict=True):
        assert one[0] == pytest.approx(other[0], rel=2e-2)
    assert (found == expected) is (before == after)


def test_moments_in_more_bits_are_those_that_were_saved(tmp_path):
    from horizon.optim.moments import read_m, read_v

    with build(optimizer=horizon.AdamW(lr=1e-2, moments="int8")) as engine:
        train(engine, 1, 4)
        engine.save_checkpoint(tmp_path / "saved").wait()
        store = engine._runtime.store
        saved = [{name: store.moments[name][b].numpy().copy() for name in store.moments} for b in (0, 1)]
        layouts = store.layouts
    with load(tmp_path / "saved", optimizer=horizon.AdamW(lr=1e-2)) as engine:
        for block, before in enumerate(saved):
            now = engine._runtime.store.states(block)
            expected_m = read_m(before["exp_avg"], before["exp_avg_scale"])
            expected_v = read_v(before["exp_avg_sq"], before["exp_avg_sq_scale"])
            for param in layouts[block].trainable:
                span = slice(param.offset, param.end)
                assert torch.equal(now["exp_avg"][span], torch.from_numpy(expected_m[span]))
                assert torch.equal(now["exp_avg_sq"][span], torch.from_numpy(expected_v[span]))


@pytest.mark.parametrize("blocks", [0, 2, 5])
def test_blocks_may_lie_elsewhere(tmp_path, blocks):
    with build(memory=horizon.MemoryConfig(hbm_blocks=2)) as engine:
        train(engine, 1, 3)
        engine.save_checkpoint(tmp_path / "saved").wait()
        expected, final = train(engine, 4, 6), states(engine)
    with load(tmp_path / "saved", memory=horizon.MemoryConfig(hbm_blocks=blocks)) as engine:
        assert train(engine, 4, 6) == expected
        assert equal(states(engine), final)


# ---- what does not fit


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({**LLAMA, "rope_theta": 500.0}, {}, r"model\.config\.rope_parameters: .*10000.0.* when it was saved, .*500.0"),
        ({**LLAMA, "rms_norm_eps": 1e-5}, {}, r"model\.config\.rms_norm_eps: 1e-06 when it was saved, 1e-05 now"),
        (LLAMA, {"optimizer": horizon.AdamW(betas=(0.9, 0.95))}, r"optim\.beta2: 0\.999 when it was saved, 0\.95 now"),
        (LLAMA, {"optimizer": horizon.AdamW(weight_decay=0.5)}, r"optim\.weight_decay: 0\.01 when"),
        (LLAMA, {"freeze": ["*.q_proj.weight"]}, r"model\.freeze: frozen now, but not when .*layers\.0.*q_proj"),
    ],
)
def test_another_model_or_optimizer_is_refused_naming_what_differs(tmp_path, model, settings, message):
    with build() as engine:
        train(engine, 1, 2)
        engine.save_checkpoint(tmp_path / "saved").wait()
        masters = dict(engine.named_master_parameters())
    with build(model, **settings) as engine:
        before = states(engine)
        with pytest.raises(CheckpointError, match=message) as caught:
            engine.restore(tmp_path / "saved")
        assert "resume_weights_only=true" in str(caught.value)
        assert equal(states(engine), before)
        assert engine.restore(tmp_path / "saved", weights_only=True) == {}
        assert engine.num_steps == 0
        assert equal(dict(engine.named_master_parameters()), masters)
        assert all(not tensor.any() for (_, name), tensor in states(engine).items() if name.startswith("exp_avg"))
        train(engine, 1, 2)


def test_other_weights_are_refused_even_alone(tmp_path):
    with build() as engine:
        engine.save_checkpoint(tmp_path / "saved").wait()
    for change, message in (
        ({"num_hidden_layers": 2}, r"9 unexpected: model\.layers\.2\.self_attn\.q_proj\.weight"),
        ({"num_hidden_layers": 4}, r"9 missing: model\.layers\.3\."),
        ({"intermediate_size": 80}, r"gate_proj\.weight \(\[48, 32\] saved, \[80, 32\] in the model\)"),
    ):
        with build({**LLAMA, **change}) as engine:
            with pytest.raises(CheckpointError, match=message):
                engine.restore(tmp_path / "saved", weights_only=True)
            train(engine, 1, 1)
