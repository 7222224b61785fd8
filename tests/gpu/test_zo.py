"""Zeroth-order steps on a GPU: the host's bits from the kernel, waits that hold, memory as planned, no hidden wait."""

import sys

import numpy as np
import pytest
import torch

import horizon
from horizon.layout import ParamSpec, place_block
from horizon.models.blocks import BlockModel
from horizon.store.split import split_master
from horizon.stream.streams import Streams
from horizon.units import GIB, MIB
from horizon.zo import perturb
from horizon.zo.table import Term, Update, Work
from tests.gpu.models import DEVICE, EAGER, batches, build, differing

pytestmark = pytest.mark.gpu

CYCLES = 40_000_000
VOCAB = 512
LARGE = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True, **EAGER,
}  # fmt: skip
OPT = {
    "model_type": "opt", "vocab_size": VOCAB, "hidden_size": 512, "ffn_dim": 2048, "word_embed_proj_dim": 512,
    "num_hidden_layers": 4, "num_attention_heads": 8, "max_position_embeddings": 256, "dropout": 0.0,
}  # fmt: skip


def engine(model, master="bf16", memory=None, compute_dtype="auto", device=DEVICE, lr=1e-3, **settings):
    return horizon.Engine.from_pretrained(
        model, optimizer=horizon.ZerothOrder(lr=lr, master=master, **settings), device=device, memory=memory,
        compute_dtype=compute_dtype, kernels="torch", self_check=False,
    )  # fmt: skip


def weights(engine_):
    return dict(engine_.named_master_parameters())


LAYOUT = place_block(
    0, "block", [ParamSpec("a", "a", (300, 70)), ParamSpec("b", "b", (5000,), decay=False),
                 ParamSpec("c", "c", (129, 65)), ParamSpec("frozen", "frozen", (3000,), trainable=False)],
)  # fmt: skip


@pytest.mark.parametrize("master", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_copies", [0, 1, 2])
@pytest.mark.parametrize("num_updates", [0, 1, 3])
def test_the_kernel_has_the_hosts_bits(master, compute, num_copies, num_updates):
    settings = horizon.ZerothOrder(eps=1e-3, queries=2, master=master, seed=3)
    device = torch.device(DEVICE, 0)
    updates = [Update(step, 0.99, (Term(step, 0, 2e-3), Term(step, 1, -1e-3))) for step in range(1, num_updates + 1)]
    w = torch.randn(LAYOUT.num_elements, generator=torch.Generator().manual_seed(0)) * 0.02
    w[:100] *= 1e-4  # subnormal in fp16
    given = split_master(w) if master == "fp32" else (w.to(settings.master_dtype),)
    found = []
    for place in (torch.device("cpu"), device):
        states = [state.clone().to(place) for state in given]
        copies = [torch.zeros(LAYOUT.num_elements, dtype=compute, device=place) for _ in range(num_copies)]
        run = perturb.make_perturber([LAYOUT], settings, place)
        run.begin([Work(0, updates, num_updates + 1, 2)])
        run(0, states, copies, 1, bool(updates))
        found.append(
            [tensor.cpu().view(torch.int16 if tensor.itemsize == 2 else torch.int32) for tensor in (*states, *copies)]
        )
    for number, (expected, tensor) in enumerate(zip(*found, strict=True)):
        assert torch.equal(expected, tensor), f"tensor {number}: {int((expected != tensor).sum())} of {tensor.numel()}"


@pytest.mark.parametrize("family", ["llama", "llama, tied", "gpt2"])
def test_streamed_on_the_gpu_is_streamed_on_the_cpu(family):
    model, step = build(family), batches(2)
    losses = []
    for device in ("cpu", DEVICE):
        with engine(model, "fp32", compute_dtype="float32", device=device, seed=1) as streamed:
            losses.append([streamed.step(step).loss for _ in range(3)])
    assert np.allclose(losses[0], losses[1], rtol=2e-4)


@pytest.mark.parametrize("master", ["fp32", "bf16", "fp16"])
def test_a_run_on_the_gpu_replays_bit_for_bit_on_the_cpu(master, tmp_path):
    model, settings = build("llama, tied"), {"queries": 2, "weight_decay": 0.1, "momentum": 0.5, "momentum_steps": 2}
    with engine(model, master, writeback_every=3, **settings) as streamed:
        streamed.log_steps(tmp_path / "replay.jsonl")
        for seed in range(8):
            streamed.step(batches(seed=seed))
        expected = weights(streamed)
    with engine(model, master, device="cpu", **settings) as replayed:
        assert replayed.replay(tmp_path / "replay.jsonl") == 8
        assert differing(weights(replayed), expected) == []


@pytest.mark.parametrize("master", ["fp32", "bf16", "fp16"])
def test_without_a_learning_rate_no_bit_moves(master):
    with engine(build("llama, tied"), master, lr=0.0, eps=1e-2) as streamed:
        before = weights(streamed)
        for seed in range(200):
            streamed.step(batches(seed=seed))
        assert differing(weights(streamed), before) == []


def run(streamed, disturb=lambda: None, num_steps=4):
    """Losses of some steps and the weights they leave."""
    disturb()
    losses = [streamed.step(batches(2, rows=1, tokens=8, vocab=VOCAB, seed=seed)).loss for seed in range(num_steps)]
    return losses, weights(streamed)


def same(found, expected):
    return found[0] == expected[0] and differing(found[1], expected[1]) == []


@pytest.mark.parametrize("every", [2, 100])
@pytest.mark.parametrize("master", ["fp32", "bf16"])
def test_writing_back_less_often_changes_no_bit(every, master):
    with engine(LARGE, master) as streamed:
        expected = run(streamed)
    with engine(LARGE, master, writeback_every=every) as streamed:
        assert same(run(streamed), expected)


def slow_down(monkeypatch, role):
    """Let a stream sleep before each of its copies, or compute before each layer."""
    copy, layer = Streams.copy, BlockModel._run_layer

    def slow_copy(self, stream, target, source):
        if stream is getattr(self, role):
            with self.running(stream):
                torch.cuda._sleep(CYCLES)
        copy(self, stream, target, source)

    def slow_layer(self, *args):
        torch.cuda._sleep(CYCLES)
        return layer(self, *args)

    if role == "compute":
        monkeypatch.setattr(BlockModel, "_run_layer", slow_layer)
    else:
        monkeypatch.setattr(Streams, "copy", slow_copy)


def forget_wait(monkeypatch, function):
    wait_event = torch.cuda.Stream.wait_event

    def forgetful(self, event):
        if sys._getframe(1).f_code.co_name != function:
            wait_event(self, event)

    monkeypatch.setattr(torch.cuda.Stream, "wait_event", forgetful)


@pytest.mark.parametrize("role", ["compute", "fetch", "drain"])
def test_a_slow_stream_changes_no_bit(monkeypatch, role):
    with engine(LARGE) as streamed:
        expected = run(streamed)
    with engine(LARGE) as streamed:
        streamed.plan_micro_batch(1, 8)
        assert same(run(streamed, lambda: slow_down(monkeypatch, role)), expected)


@pytest.mark.parametrize(
    ("function", "slow"),
    [
        ("acquire", "fetch"),  # compute reads a slot before its master has landed
        ("_load", "drain"),  # a master lands in a slot whose contents have yet to leave, or leaves the host too early
        ("release", "compute"),  # a master leaves before it is updated
    ],
)
def test_without_a_wait_the_result_differs(monkeypatch, function, slow):
    with engine(LARGE, lr=1e-2) as streamed:
        expected = run(streamed)
    with engine(LARGE, lr=1e-2) as streamed:
        streamed.plan_micro_batch(1, 8)

        def disturb():
            slow_down(monkeypatch, slow)
            forget_wait(monkeypatch, function)

        found = run(streamed, disturb)
        monkeypatch.undo()
        torch.cuda.synchronize(DEVICE)
    assert not same(found, expected)


@pytest.mark.parametrize("shape", [LARGE, OPT], ids=["llama", "opt"])
def test_a_step_makes_the_host_wait_for_nothing_but_its_losses(monkeypatch, shape):
    with engine({**shape, "attn_implementation": "sdpa"}) as streamed:
        step = batches(2, rows=2, tokens=64, vocab=VOCAB)
        streamed.step(step), streamed.step(step)  # kernels compile
        executor = streamed._runtime.executor
        losses, layer = executor.losses, BlockModel.layer

        def watched(*args):
            torch.cuda.set_sync_debug_mode("error")
            return layer(*args)

        def restored(*args):
            try:
                return losses(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(executor, "losses", restored)
        monkeypatch.setattr(BlockModel, "layer", watched)
        assert streamed.step(step).loss > 0


@pytest.mark.parametrize("master", ["fp32", "fp16"])
def test_the_devices_peak_is_what_was_planned(master):
    model = {**LARGE, "num_hidden_layers": 4, "attn_implementation": "sdpa"}
    with engine(model, master) as streamed:
        streamed.plan_micro_batch(8, 512)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for seed in range(3):
            streamed.step(batches(1, rows=8, tokens=512, vocab=VOCAB, seed=seed))
        planned, measured = streamed.plan.num_bytes("device"), streamed.device_bytes
    assert measured <= planned + 256 * MIB
    assert measured < 3 * GIB


def test_a_bias_a_product_and_a_relu_in_one_kernel_are_what_they_are_apart(monkeypatch):
    from horizon.zo import runtime

    step, losses = batches(2, rows=2, tokens=64, vocab=VOCAB), []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(runtime, "fuse_relu", lambda model: 0)
        with engine(OPT, "fp16") as streamed:
            layers = streamed._runtime.model.structure.layers
            assert all(("forward" in layer.fc1.__dict__) is fused for layer in layers)
            losses.append([streamed.step(step).loss for _ in range(2)])
    assert np.allclose(losses[0], losses[1], rtol=1e-4)


def test_evaluation_and_logits_are_those_of_the_updated_weights():
    model, step = build("llama, tied"), batches(2)
    with engine(model, "fp32", compute_dtype="float32", lr=1e-2, writeback_every=4) as streamed:
        for _ in range(3):
            streamed.step(step)
        found, logits = streamed.evaluate(step), streamed.next_token_logits({"input_ids": step[0]["input_ids"]})
        plain = build("llama, tied").eval()
        plain.load_state_dict(weights(streamed), strict=False)
    with torch.no_grad():
        expected = [float(plain(**batch).loss) for batch in step]
        assert found == pytest.approx(sum(expected) / 2, rel=1e-4)
        assert torch.allclose(logits, plain(step[0]["input_ids"]).logits[:, -1], atol=1e-3)
