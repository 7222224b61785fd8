"""Checkpoints where blocks live in device memory: of one version, without memory of their own there, and loadable."""

import pytest
import torch

import horizon
from horizon.checkpoint.format import list_arrays
from horizon.checkpoint.reader import Checkpoint
from horizon.config.schema import Moments
from horizon.store.split import join_master
from tests.gpu.models import EAGER, batches, build, engine

pytestmark = pytest.mark.gpu

TOKENS, VOCAB = 64, 512
LARGER = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 8,
          "vocab_size": VOCAB, "num_hidden_layers": 4, **EAGER}  # fmt: skip


def steps(streamed, first, last):
    return [streamed.step(batches(tokens=TOKENS, vocab=VOCAB, seed=seed)).loss for seed in range(first, last + 1)]


def arrays_now(streamed):
    """What a checkpoint of this moment has to hold, copied with everything at rest."""
    runtime = streamed._runtime
    runtime.wait_for_updates()
    torch.cuda.synchronize()
    found = {}
    for array in list_arrays(runtime.model.layouts, Moments(runtime.optimizer.moments)):
        numel = torch.Size(array.spec.shape).numel()
        span = slice(array.start, array.start + numel)
        parts = [runtime.store.read_state(name, array.block)[span] for name in array.states]
        flat = join_master(*parts) if len(parts) == 2 else parts[0].clone()
        found[array.spec.name, array.spec.kind] = flat.view(array.spec.shape)
    return found


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize("hbm_blocks", [0, 3, 6])
@pytest.mark.parametrize("staging", ["auto", "8MiB"])
def test_what_is_saved_while_training_goes_on_is_the_state_of_that_moment(tmp_path, hbm_blocks, max_grad_norm, staging):
    memory = horizon.MemoryConfig(hbm_blocks=hbm_blocks)
    with engine(build("llama", **LARGER), memory=memory, max_grad_norm=max_grad_norm) as streamed:
        streamed.plan_checkpoints(staging)
        for number in range(3):
            steps(streamed, 1, 2)
            expected = arrays_now(streamed)
            save = streamed.save_checkpoint(tmp_path / str(number))
            steps(streamed, 3, 6)
            save.wait()
            checkpoint = Checkpoint(tmp_path / str(number))
            for (name, kind), value in expected.items():
                assert torch.equal(checkpoint.read(name, kind), value), (name, kind)


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize("policy", ["nvme_optimizer", "nvme_all"])
@pytest.mark.parametrize("nvme_engine", ["direct", "tensorstore"])
def test_states_on_nvme_are_saved_while_updates_overwrite_them(tmp_path, policy, nvme_engine, max_grad_norm):
    memory = horizon.MemoryConfig(policy=policy, nvme_dir=str(tmp_path), nvme_engine=nvme_engine)
    with engine(build("llama", **LARGER), memory=memory, max_grad_norm=max_grad_norm) as streamed:
        steps(streamed, 1, 2)
        expected = arrays_now(streamed)
        save = streamed.save_checkpoint(tmp_path / "saved")
        after = steps(streamed, 3, 6)
        save.wait()
    checkpoint = Checkpoint(tmp_path / "saved")
    assert all(torch.equal(checkpoint.read(name, kind), value) for (name, kind), value in expected.items())
    settings = {"optimizer": horizon.AdamW(lr=1e-2), "device": "cuda", "kernels": "torch", "self_check": False}
    for where in (memory, horizon.MemoryConfig(policy="dram")):
        with horizon.Engine.load_checkpoint(
            tmp_path / "saved", memory=where, max_grad_norm=max_grad_norm, **settings
        ) as streamed:
            assert steps(streamed, 3, 6) == pytest.approx(after, rel=1e-4)


def test_a_save_right_behind_a_step_waits_for_its_update(tmp_path):
    memory = horizon.MemoryConfig(hbm_blocks=3)
    with engine(build("llama", **LARGER), memory=memory) as streamed:
        steps(streamed, 1, 3)
        save = streamed.save_checkpoint(tmp_path / "saved")  # kernels and threads are still at work
        expected = arrays_now(streamed)
        save.wait()
    checkpoint = Checkpoint(tmp_path / "saved")
    assert all(torch.equal(checkpoint.read(name, kind), value) for (name, kind), value in expected.items())


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("after", [0, 6])
def test_it_goes_on_elsewhere(tmp_path, before, after):
    """With the kernels that it had: a checkpoint remembers that attention was eager, and placements change no bit."""
    model = build("llama", **LARGER)
    with engine(model, memory=horizon.MemoryConfig(hbm_blocks=before)) as streamed:
        steps(streamed, 1, 3)
        streamed.save_checkpoint(tmp_path / "saved")
        expected = steps(streamed, 4, 8)
    settings = {"optimizer": horizon.AdamW(lr=1e-2), "device": "cuda", "kernels": "torch", "self_check": False}
    memory = horizon.MemoryConfig(hbm_blocks=after)
    with horizon.Engine.load_checkpoint(tmp_path / "saved", memory=memory, **settings) as streamed:
        assert streamed.num_steps == 3
        assert streamed._runtime.model.config._attn_implementation == "eager"
        found = steps(streamed, 4, 8)
        assert found == (expected if before == after else pytest.approx(expected, rel=1e-4))


def test_saving_takes_no_device_memory(tmp_path):
    with engine(build("llama", **LARGER), memory=horizon.MemoryConfig(hbm_blocks=4)) as streamed:
        steps(streamed, 1, 3)
        torch.cuda.synchronize()
        before = torch.cuda.max_memory_allocated()
        save = streamed.save_checkpoint(tmp_path / "saved")
        steps(streamed, 4, 6)
        save.wait()
        assert torch.cuda.max_memory_allocated() <= before + (1 << 20)


def test_a_checkpoint_of_the_gpu_goes_on_on_the_cpu(tmp_path):
    with engine(build("llama"), memory=horizon.MemoryConfig(hbm_blocks=2)) as streamed:
        for seed in (1, 2):
            streamed.step(batches(seed=seed))
        streamed.save_checkpoint(tmp_path / "saved").wait()
        expected = streamed.evaluate(batches(seed=9))
    settings = {"optimizer": horizon.AdamW(lr=1e-2), "device": "cpu", "self_check": False}
    with horizon.Engine.load_checkpoint(tmp_path / "saved", **settings) as streamed:
        assert streamed.evaluate(batches(seed=9)) == pytest.approx(expected, rel=2e-2)
        streamed.step(batches(seed=3))
