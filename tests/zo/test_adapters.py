"""Zeroth-order steps of a model with a LoRA adapter: it alone is perturbed and moved, as plain MeZO does it."""

import copy

import pytest
import torch

import horizon
from horizon.errors import CheckpointError
from horizon.replaying import replay
from horizon.zo.plan import least_traffic
from tests.parity.adapters import TARGETS, adapted, peft
from tests.parity.reference import assert_same_tensors, build, padded, plain
from tests.zo.reference import PlainMezo, counter_noise, decays_of, engine_for, layouts_of, masters, one_rounding

LR = 1e-2
STEPS = [[plain(0)], [plain(1), plain(2)], [padded(3, [12, 7])], [plain(4)]]


def settings(**changes):
    return horizon.ZerothOrder(**{"lr": LR, "eps": 1e-3, "weight_decay": 0.1, "seed": 11, **changes})


def run(engine, steps=STEPS):
    return [engine.step(list(step)).loss for step in steps]


@pytest.mark.parametrize("family", TARGETS)
def test_every_step_is_that_of_plain_mezo_on_the_adapter(family):
    model = adapted(family, {"tie_word_embeddings": family == "gemma2"})
    chosen = settings(queries=2, momentum=0.8, momentum_steps=2)
    with engine_for(model, chosen) as engine:
        draw = counter_noise(layouts_of(engine), 11)
        reference = PlainMezo(model.get_base_model(), chosen, draw, one_rounding, decays_of(engine))
        before = copy.deepcopy(reference.weights)
        for batches in STEPS:
            result, (loss, projected) = engine.step(list(batches)), reference.step(batches, LR)
            assert (result.loss, list(result.projected_gradients)) == (loss, projected)
        found = masters(engine)
    assert_same_tensors(found, reference.weights)
    assert all(torch.equal(value, before[name]) is ("lora_" not in name) for name, value in found.items())


@pytest.mark.parametrize("master", ["fp32", "bf16", "fp16"])
def test_without_a_learning_rate_no_bit_moves(master):
    with engine_for(adapted(base={"tie_word_embeddings": True}), settings(lr=0.0, master=master)) as engine:
        before = masters(engine)
        for step in range(30):
            engine.step(plain(step, rows=1, tokens=3))
        engine.evaluate(plain(0))
        assert_same_tensors(masters(engine), before)


@pytest.mark.parametrize("tied", [False, True])
def test_the_base_crosses_the_link_once_a_step_and_has_one_copy(tied):
    with engine_for(adapted(base={"tie_word_embeddings": tied}), settings(master="bf16")) as engine:
        layouts, runtime = layouts_of(engine), engine._runtime
        run(engine, STEPS[:2])
        with engine.trace() as recording:
            run(engine, STEPS[2:])
        moved = {t.direction: t.num_bytes for t in recording.split.traffic}
        streamed = layouts[1:] if tied else layouts
        least = least_traffic(runtime._needs)
        assert moved == {"H2D": least["H2D", "weights"], "D2H": least["D2H", "weights"]}
        assert moved["H2D"] == 2 * sum(lay.num_elements for lay in streamed)
        assert moved["D2H"] == 2 * sum(lay.num_trainable for lay in layouts) < moved["H2D"] / 2
        lines = {line.purpose: line.num_bytes for line in engine.plan.lines}
        copies = 4 * max(layout.num_trainable for layout in layouts), 4 * max(lay.num_slot_elements for lay in layouts)
        assert lines["perturbed copies (+eps, -eps)"] == 2 * copies[0]
        assert 0 < lines["copy of frozen weights"] <= copies[1]


def test_the_saved_adapter_on_its_base_gives_the_engines_logits(tmp_path):
    with engine_for(adapted(target_modules=["q_proj", "down_proj"], use_rslora=True), settings()) as engine:
        run(engine)
        engine.save_pretrained(tmp_path / "adapter")
        expected = engine.next_token_logits(plain(7))
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(input_ids=plain(7)["input_ids"]).logits[:, -1], expected, rtol=0, atol=1e-6)
    loaded.save_pretrained(tmp_path / "theirs")
    ours, theirs = (peft.utils.load_peft_weights(str(tmp_path / name)) for name in ("adapter", "theirs"))
    assert_same_tensors(dict(sorted(ours.items())), dict(sorted(theirs.items())))


def test_a_log_brings_the_adapter_back_and_the_run_goes_on(tmp_path):
    model, log = adapted(), tmp_path / "replay.jsonl"
    with engine_for(model, settings()) as engine:
        losses, expected = run(engine), masters(engine)
    with engine_for(
        model,
        settings(),
    ) as engine:
        engine.log_steps(log)
        run(engine, STEPS[:2])
    with engine_for(model, settings()) as engine:
        assert engine.replay(log) == 2
        assert run(engine, STEPS[2:]) == losses[2:]
        assert_same_tensors(masters(engine), expected)
    with (
        engine_for(adapted(r=2), settings()) as engine,
        pytest.raises(CheckpointError, match=r"began with other weights .* another adapter"),
    ):
        engine.replay(log)


def test_horizon_replay_makes_the_adapter_anew(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    lora, log = horizon.LoraConfig(rank=4, targets=["q_proj", "v_proj"]), tmp_path / "replay.jsonl"
    with engine_for(str(tmp_path / "base"), settings(), lora=lora, seed=11) as engine:
        engine.log_steps(log)
        run(engine)
        engine.save_pretrained(tmp_path / "trained")
    replay(str(tmp_path / "base"), str(log), str(tmp_path / "again"), device="cpu")
    names = "adapter_model.safetensors", "adapter_config.json"
    assert all((tmp_path / "again" / n).read_bytes() == (tmp_path / "trained" / n).read_bytes() for n in names)
