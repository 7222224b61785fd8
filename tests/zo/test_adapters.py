"""Zeroth-order steps of a model with LoRA adapters: these alone are perturbed and moved, as plain MeZO does it."""

import copy

import pytest
import torch

import horizon
from tests.parity.reference import assert_same_tensors, build, padded, plain
from tests.zo.reference import PlainMezo, counter_noise, decays_of, engine_for, layouts_of, masters, one_rounding

peft = pytest.importorskip("peft")

LR, EPS = 1e-2, 1e-3
STEPS = [[plain(0)], [plain(1), plain(2)], [padded(3, [12, 7])], [plain(4)]]


def settings(**changes):
    return horizon.ZerothOrder(**{"lr": LR, "eps": EPS, "weight_decay": 0.1, "seed": 11, **changes})


def adapted(family="llama", tied=False, **changes):
    """A `PeftModel` whose adapter does something already."""
    torch.manual_seed(1)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    model = peft.get_peft_model(build(family, tie_word_embeddings=tied), peft.LoraConfig(**lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gemma2", "mixtral"])
def test_every_step_is_that_of_plain_mezo_on_the_adapter(family):
    targets = "all-linear" if family != "mixtral" else ["q_proj", "v_proj"]  # its experts are no linear layers
    model, chosen = adapted(family, target_modules=targets), settings(queries=2, momentum=0.8, momentum_steps=2)
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


def test_the_saved_adapter_on_its_base_gives_the_engines_logits(tmp_path):
    model = adapted(target_modules=["q_proj", "down_proj"], use_rslora=True)
    with engine_for(model, settings()) as engine:
        for step in STEPS:
            engine.step(list(step))
        engine.save_pretrained(tmp_path / "adapter")
        expected = engine.next_token_logits(plain(7))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "adapter").eval()
    found = loaded(input_ids=plain(7)["input_ids"]).logits[:, -1]
    assert torch.allclose(found, expected, atol=1e-6)
    loaded.save_pretrained(tmp_path / "theirs")
    ours, theirs = (peft.utils.load_peft_weights(str(tmp_path / name)) for name in ("adapter", "theirs"))
    assert_same_tensors(dict(sorted(ours.items())), dict(sorted(theirs.items())))
