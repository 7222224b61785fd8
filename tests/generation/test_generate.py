"""What a streamed model generates is what transformers generates on the same weights, token for token."""

import pytest
import torch
from transformers import LogitsProcessorList

import horizon
from horizon.config.schema import MemoryConfig
from horizon.errors import BatchError, BudgetError, ConfigError
from tests.parity.reference import FAMILIES, VOCAB, build

FAMILY_SAMPLE = ["llama", "qwen3", "gemma2", "gpt2", "mixtral", "gpt_oss", "deepseek_v3", "bloom", "falcon"]
NEW = 12  # more than the sliding windows of these models hold


def prompts(rows=3, tokens=9, pad=(4, 0, 7)):
    """Prompts of different lengths, padded on the left: input_ids, attention_mask."""
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(tokens) >= torch.tensor(pad)[:, None]).long()
    return ids.where(mask.bool(), torch.tensor(0)), mask


def expected(model, ids, mask, **arguments):
    return model.eval().generate(ids, attention_mask=mask, **{"max_new_tokens": NEW, "eos_token_id": None} | arguments)


def inference(model, **settings):
    return horizon.InferenceEngine.from_pretrained(model, self_check=False, device="cpu", **settings)


def training(model, **settings):
    return horizon.Engine.from_pretrained(model, self_check=False, device="cpu", **settings)


@pytest.mark.parametrize("family", FAMILY_SAMPLE)
def test_greedy_tokens_of_prompts_of_different_lengths(family):
    model = build(family)
    ids, mask = prompts()
    with inference(model) as engine:
        assert torch.equal(
            engine.generate(ids, mask, max_new_tokens=NEW, eos_token_id=None), expected(model, ids, mask)
        )
    assert family in FAMILIES


DEEPER = {
    "llama": {"num_hidden_layers": 4},
    "gemma2": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


@pytest.mark.parametrize(("family", "share", "num_away"), [("llama", 0.9, 2), ("llama", 0.5, 3), ("gemma2", 0.5, 3)])
def test_keys_and_values_on_the_host_are_the_same(family, share, num_away):
    """As the device budget shrinks, layers move to the host, and one layer's room is for what is on its way."""
    model = build(family, **DEEPER[family])
    ids, mask = prompts()
    with inference(model) as engine:
        fixed = engine.plan.num_bytes("device")
        held = engine.plan_generation(3, 9, max_new_tokens=NEW).num_bytes("device") - fixed
    memory = MemoryConfig(device_budget=f"{fixed + int(share * held)}B")
    with inference(model, memory=memory) as engine:
        planned = engine.plan_generation(3, 9, max_new_tokens=NEW)
        assert planned.num_bytes("device") <= planned.limits.device
        lines = {(line.tier, line.purpose): line.num_bytes for line in planned.activations if line.num_bytes}
        assert ("host", f"keys and values of {num_away} layers") in lines
        assert ("device", f"keys and values of {4 - num_away} layers") in lines
        assert torch.equal(
            engine.generate(ids, mask, max_new_tokens=NEW, eos_token_id=None), expected(model, ids, mask)
        )


def test_what_does_not_fit_is_refused_before_it_is_allocated():
    with inference(build("llama")) as engine:
        device, host = (engine.plan.num_bytes(tier) for tier in ("device", "host"))
        with pytest.raises(BudgetError, match=r"keys and values of 2 layers.*fewer than 1 prompts at once"):
            engine.plan_generation(1, 3, max_new_tokens=1 << 40)
    memory = MemoryConfig(device_budget=f"{device}B", host_budget=f"{host + (64 << 20)}B")
    with inference(build("llama"), memory=memory) as engine:
        ids, mask = prompts()
        with pytest.raises(BudgetError, match=r"of device memory \(.*keys and values on their way"):
            engine.generate(ids, mask)
        assert engine.plan.num_bytes("device") == device


SAMPLING = {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3, "repetition_penalty": 1.2}


def test_sampling_draws_what_transformers_draws_and_leaves_random_numbers_alone():
    model = build("llama")
    ids, mask = prompts()
    torch.manual_seed(5)
    want = expected(model, ids, mask, num_return_sequences=2, **SAMPLING)
    with inference(model) as engine:
        torch.manual_seed(99)
        state = torch.random.get_rng_state()
        settings = {"max_new_tokens": NEW, "eos_token_id": None, "num_return_sequences": 2, **SAMPLING}
        got = engine.generate(ids, mask, seed=5, **settings)
        assert torch.equal(got, want) and got.shape == (6, 9 + NEW)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert not torch.equal(engine.generate(ids, mask, seed=6, **settings), want)
        torch.manual_seed(5)
        assert torch.equal(engine.generate(ids, mask, **settings), want)  # without a seed torch's own go on


def test_the_models_own_settings_hold_unless_others_are_given():
    model = build("llama")
    ids, mask = prompts()
    free = expected(model, ids, mask)
    end = int(free[1, 12])  # a token that a row writes becomes the end of texts
    model.generation_config.max_new_tokens, model.generation_config.eos_token_id = 7, end
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.cache_implementation = "hybrid"
    want = model.eval().generate(ids, attention_mask=mask)
    with inference(model) as engine:
        assert torch.equal(engine.generate(ids, mask), want)
        assert torch.equal(
            engine.generate(ids, mask, max_new_tokens=NEW, eos_token_id=None, repetition_penalty=1.0), free
        )


def test_rows_that_end_are_padded_and_the_pass_ends_with_the_last():
    model = build("qwen2")
    ids, mask = prompts()
    free = expected(model, ids, mask)
    ends = [int(row[11]) for row in free]
    want = expected(model, ids, mask, eos_token_id=ends)
    assert want.shape[1] < free.shape[1]
    with inference(model) as engine:
        assert torch.equal(engine.generate(ids, mask, max_new_tokens=NEW, eos_token_id=ends), want)


def test_a_processor_of_the_callers_own_is_used():
    model = build("llama")
    ids, mask = prompts()

    def only_seven(input_ids, scores):
        return scores.masked_fill(torch.arange(VOCAB) != 7, -torch.inf)

    with inference(model) as engine:
        found = engine.generate(ids, mask, max_new_tokens=4, logits_processor=LogitsProcessorList([only_seven]))
        assert found[:, 9:].eq(7).all()


def test_between_steps_the_newest_weights_generate_and_training_does_not_notice():
    ids, mask = prompts()
    batch = {"input_ids": ids, "labels": ids.where(mask.bool(), -100), "attention_mask": mask}
    model = build("gemma2")
    with training(model, optimizer=horizon.AdamW(lr=1e-2)) as engine, training(model) as alone:
        alone.lr = 1e-2
        for _ in range(3):
            result = engine.step(batch)
            planned = engine.plan_generation(3, 9, max_new_tokens=NEW)
            assert {line.purpose for line in planned.activations if line.num_bytes} == {"keys and values of 2 layers"}
            found = engine.generate(ids, mask, max_new_tokens=NEW, eos_token_id=None)  # updates are still under way
            assert result.loss == alone.step(batch).loss
            with torch.no_grad():
                for name, value in engine.named_master_parameters():
                    model.get_parameter(name).copy_(value)
            assert torch.equal(found, expected(model, ids, mask))


def test_a_zeroth_order_engine_generates_with_its_pending_update():
    ids, mask = prompts()
    model = build("llama")
    optimizer = horizon.ZerothOrder(lr=1e-2)
    with training(model, optimizer=optimizer, max_grad_norm=None) as engine:
        engine.step({"input_ids": ids, "labels": ids, "attention_mask": mask})
        found = engine.generate(ids, mask, max_new_tokens=NEW, eos_token_id=None)
        with torch.no_grad():
            for name, value in engine.named_master_parameters():
                model.get_parameter(name).copy_(value)
        assert torch.equal(found, expected(model, ids, mask))


def test_from_a_folder_and_from_a_checkpoint(tmp_path):
    ids, mask = prompts()
    with training(build("qwen3"), optimizer=horizon.AdamW(lr=1e-2)) as engine:
        engine.step({"input_ids": ids, "labels": ids, "attention_mask": mask})
        engine.save_checkpoint(tmp_path / "checkpoint").wait()
        engine.save_pretrained(tmp_path / "folder")
        want = engine.generate(ids, mask, max_new_tokens=NEW)
    for opened in (
        horizon.InferenceEngine.from_pretrained(tmp_path / "folder", device="cpu"),
        horizon.InferenceEngine.load_checkpoint(tmp_path / "checkpoint", device="cpu"),
        horizon.InferenceEngine.load_checkpoint(tmp_path / "checkpoint", model=tmp_path / "folder", device="cpu"),
    ):
        with opened as engine:
            assert torch.equal(engine.generate(ids, mask, max_new_tokens=NEW), want)


def test_weights_may_be_on_a_disk(tmp_path):
    model = build("llama")
    ids, mask = prompts()
    memory = MemoryConfig(policy="nvme_all", nvme_dir=str(tmp_path))
    with inference(model, memory=memory) as engine:
        assert engine.plan.num_bytes("nvme") > 0
        assert torch.equal(
            engine.generate(ids, mask, max_new_tokens=NEW, eos_token_id=None), expected(model, ids, mask)
        )


def test_the_host_keeps_weights_alone():
    with inference(build("llama")) as exact, inference(build("llama"), compute_dtype="bfloat16") as narrow:
        for engine, size in ((exact, 4), (narrow, 2)):
            states = [n for n in engine.plan.lines if n.tier == "host" and n.purpose != "framework"]
            padded = sum(layout.num_elements for layout in engine._runtime.model.layouts)
            assert sum(line.num_bytes for line in states) == size * padded
            held = engine._runtime.store.num_bytes
            assert held["weights"] + held.get("residual", 0) == size * padded
            assert held["exp_avg"] <= 4096  # a page, for an arena has one
            assert not hasattr(engine, "step")


def test_after_a_failure_the_engine_goes_on():
    model = build("llama")
    ids, mask = prompts()
    batch = {"input_ids": ids, "labels": ids}

    def broken(*args):
        raise RuntimeError("broken")

    with training(model) as engine:
        loss, before = engine.evaluate(batch), engine.plan
        with pytest.raises(RuntimeError, match="broken"):  # between two passes
            engine.generate(ids, mask, logits_processor=LogitsProcessorList([broken]))
        hook = engine._runtime.model.skeleton.lm_head.register_forward_hook(broken)
        with pytest.raises(RuntimeError, match="broken"):  # inside of one, with the head bound
            engine.generate(ids, mask)
        hook.remove()
        assert engine.plan == before
        assert all(parameter.is_meta for parameter in engine._runtime.model.skeleton.parameters())
        assert engine.evaluate(batch) == loss
        assert torch.equal(
            engine.generate(ids, mask, max_new_tokens=NEW, eos_token_id=None), expected(model, ids, mask)
        )
        assert engine.step(batch).loss == pytest.approx(loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, "does not support num_beams=4"),
        ({"prompt_lookup_num_tokens": 3}, "does not support prompt_lookup_num_tokens=3"),
        ({"use_cache": False}, "does not support use_cache=False"),
        ({"cache_implementation": "static"}, "does not support cache_implementation=static"),
        ({"return_dict_in_generate": True}, "only token ids are given back"),
        ({"guidance_scale": 2.0}, "does not support guidance_scale"),
        ({"temprature": 0.5}, "generate takes no temprature"),
        ({"past_key_values": 1}, "generate takes no past_key_values"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_length": 9}, "prompts of 9 tokens leave 0 new ones"),
        ({"max_new_tokens": 56}, "makes 65, but the model has 64 positions"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"stop_strings": ["a"]}, "tokenizer"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(arguments, message, gpt2):
    with pytest.raises(ConfigError, match=message):
        gpt2.generate(*prompts(), **arguments)


def test_prompts_padded_behind_are_refused(gpt2):
    ids, mask = prompts()
    for wrong in (mask.flip(1), torch.ones_like(mask).index_fill(1, torch.tensor([4]), 0)):
        with pytest.raises(BatchError, match="padded on the left"):
            gpt2.generate(ids, wrong)
    with pytest.raises(BatchError, match="outside the model's vocabulary"):
        gpt2.generate(ids + VOCAB, mask)


@pytest.fixture(scope="module")
def gpt2():
    with inference(build("gpt2")) as engine:
        yield engine
