"""Moments in fewer bits: streamed training equals a plain loop over whole parameters, and learns as with float32."""

import numpy as np
import pytest
import torch

import horizon
from horizon import MemoryConfig
from horizon.config.schema import Moments
from horizon.errors import ConfigError
from horizon.optim import updater
from horizon.optim.adamw import AdamW, step_scalars
from horizon.optim.moments import noise
from horizon.plan.states import MOMENTS
from horizon.store.split import join_master, split_master
from tests.covering import pairwise
from tests.parity.reference import LR, MAX_GRAD_NORM, Resident, assert_same_tensors, build, engine_for, plain

NARROW = ["bfloat16", "int8"]


class PlainLoop(Resident):
    """All in memory: autograd, clipping, and one call of the update for each whole parameter.

    What it takes from outside is where each parameter lies (block, offset): the rounding depends on it.
    """

    def __init__(self, model, moments, places, seed):
        super().__init__(model)
        self.places, self.seed, self.num_steps = places, seed, 0
        self.update, self.adamw = updater.load_update(Moments(moments)), AdamW(lr=LR, moments=moments)
        self.states = {}
        for name, parameter in self.named.items():
            hi, lo = (half.flatten().view(torch.uint16).numpy() for half in split_master(parameter.detach()))
            kept = [self.zeros(state, parameter.numel()) for state in MOMENTS[Moments(moments)]]
            self.states[name] = [hi, lo, *kept]

    @staticmethod
    def zeros(state, length):
        kinds = {torch.bfloat16: np.uint16, torch.uint8: np.uint8, torch.float32: np.float32}
        return np.zeros(state.span(0, length).stop, kinds[state.dtype])

    def train(self, batches):
        loss = self.backward(batches)
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), float("inf"))
        scale = float((MAX_GRAD_NORM / (norm + 1e-6)).clamp(max=1.0))
        self.num_steps += 1
        for name, parameter in self.named.items():
            hi, lo, m, v, *scales = self.states[name]
            block, offset = self.places[name]
            scalars = step_scalars(self.adamw, LR, self.num_steps, scale, self._decays(name, parameter))
            key = noise(self.seed, self.num_steps, block, offset)
            self.update(hi, lo, m, v, parameter.grad.flatten().numpy(), *scales, scalars, key)
            halves = (torch.from_numpy(half.view(np.int16)) for half in (hi, lo))
            parameter.data.copy_(join_master(*halves).view(parameter.shape))
            parameter.grad = None
        if self._head is not None:
            self._head.data.copy_(self._embedding.data)
            self._head.grad = None
        return loss, float(norm)


@pairwise(moments=NARROW, tied=[False, True], threads=[1, 3])
def test_streamed_training_equals_a_plain_loop(moments, tied, threads, monkeypatch):
    monkeypatch.setattr(updater.Updater.__init__, "__defaults__", (512,))  # chunks: several to a parameter
    model = build("qwen2", tie_word_embeddings=tied)
    steps = [[plain(3 * seed), plain(3 * seed + 1, rows=1)] for seed in range(4)]
    settings = {"optimizer": AdamW(lr=LR, moments=moments), "seed": 7}
    with engine_for(model, **settings, memory=MemoryConfig(update_threads=threads)) as engine:
        store = engine._runtime.store
        places = {name: (store.place(name)[0], store.place(name)[1].offset) for name in store.names()}
        loop = PlainLoop(model, moments, places, seed=7)
        for number, batches in enumerate(steps, start=1):
            result = engine.step(batches)
            assert (result.loss, result.grad_norm) == loop.train(batches), f"step {number}"
            assert_same_tensors(dict(engine.named_master_parameters()), loop.weights(), f"step {number}")


@pytest.mark.parametrize("max_grad_norm", [1e9, None], ids=["kept", "ring"])
@pytest.mark.parametrize("moments", NARROW)
def test_how_a_step_is_executed_changes_no_bit(moments, max_grad_norm):
    """Gradients kept or streamed through the ring, other slots and threads, one call or two for a step."""
    found = []
    for slots, threads, accumulate in ((2, 1, False), (1, 3, False), (3, 2, True)):
        memory = MemoryConfig(weight_slots=slots, update_threads=threads)
        optimizer = AdamW(lr=LR, moments=moments)
        with engine_for(build("llama"), optimizer=optimizer, max_grad_norm=max_grad_norm, memory=memory) as engine:
            for seed in range(3):
                if accumulate:
                    engine.forward_backward(plain(seed))
                    engine.optimizer_step()
                else:
                    engine.step(plain(seed))
            found.append(dict(engine.named_master_parameters()))
    for other in found[1:]:
        assert_same_tensors(other, found[0])


@pytest.mark.parametrize("moments", NARROW)
def test_lagged_steps_that_nothing_clips_are_the_exact_ones(moments):
    found = []
    for clip in ("exact", "lagged"):
        settings = {"optimizer": AdamW(lr=LR, moments=moments), "max_grad_norm": 1e9, "seed": 7}
        with engine_for(build("llama"), clip=clip, **settings) as engine:
            losses = [engine.step(plain(seed)).loss for seed in range(3)]
            found.append((losses, dict(engine.named_master_parameters())))
    assert found[0][0] == found[1][0]
    assert_same_tensors(found[1][1], found[0][1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": "speculative"}, "clip=speculative .*optim.moments=float32, or optim.clip=exact"),
        ({"memory": MemoryConfig(policy="hbm_first")}, "memory.policy=hbm_first with optim.moments=int8"),
        ({"memory": MemoryConfig(hbm_blocks=2)}, "memory.hbm_blocks=2 with optim.moments=int8"),
    ],
)
def test_what_needs_float32_moments_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        engine_for(build("llama"), optimizer=AdamW(lr=LR, moments="int8"), **settings)


def test_formats_round_differently_and_float32_is_the_default():
    def weights(**settings):
        with engine_for(build("llama"), **settings) as engine:
            for seed in range(3):
                engine.step(plain(seed))
            planned = {line.purpose: line.num_bytes for line in engine.plan.lines}
            return planned, dict(engine.named_master_parameters())

    planned, default = weights()
    assert_same_tensors(weights(optimizer=AdamW(lr=LR, moments="float32"))[1], default)
    for moments, label, per_64 in (("bfloat16", "bf16", 256), ("int8", "int8, scales", 136)):
        narrow_planned, narrow = weights(optimizer=AdamW(lr=LR, moments=moments))
        assert all(not torch.equal(narrow[name], default[name]) for name in default)
        expected = planned["exp_avg, exp_avg_sq (fp32)"] // 512 * per_64
        assert narrow_planned[f"exp_avg, exp_avg_sq ({label})"] == expected


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match=r"optim.moments='fp8': expected one of float32, bfloat16, int8"):
        engine_for(build("llama"), optimizer=horizon.AdamW(moments="fp8"))


def test_it_learns_as_with_float32_moments():
    """120 steps over eight sequences that a model of this size can learn by heart."""
    batches = [plain(seed, rows=4, tokens=16) for seed in range(8)]
    found = {}
    for moments in Moments:
        optimizer = AdamW(lr=3e-3, moments=moments)
        with engine_for(build("llama", hidden_size=64), optimizer=optimizer, max_grad_norm=1.0) as engine:
            found[moments] = [engine.step(batches[step % 8]).loss for step in range(120)]
    start, late = found["float32"][0], {moments: float(np.mean(losses[-8:])) for moments, losses in found.items()}
    assert late["float32"] < 0.25 * start
    for moments in NARROW:
        assert late[moments] == pytest.approx(late["float32"], abs=0.01 * start), moments
