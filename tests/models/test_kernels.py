import contextlib
import sys
import types

import pytest
import torch
from transformers.models.llama import modeling_llama

from horizon.config.schema import Kernels
from horizon.errors import ConfigError
from horizon.models import kernels
from horizon.models.kernels import FusedKernels, choose_kernels, liger_available
from horizon.models.skeleton import build_skeleton

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TINY = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("wish", "device", "installed", "chosen"),
    [
        (Kernels.auto, GPU, True, Kernels.liger),
        (Kernels.auto, GPU, False, Kernels.torch),
        (Kernels.auto, CPU, True, Kernels.torch),
        (Kernels.liger, GPU, True, Kernels.liger),
        (Kernels.torch, GPU, True, Kernels.torch),
        (Kernels.torch, CPU, False, Kernels.torch),
    ],
)
def test_auto_means_ligers_kernels_where_they_can_run(monkeypatch, wish, device, installed, chosen):
    monkeypatch.setattr(kernels, "liger_available", lambda: installed)
    assert choose_kernels(wish, device) is chosen


@pytest.mark.parametrize(("device", "installed"), [(CPU, True), (CPU, False), (GPU, False)])
def test_liger_asked_for_and_not_possible_is_refused(monkeypatch, device, installed):
    monkeypatch.setattr(kernels, "liger_available", lambda: installed)
    with pytest.raises(ConfigError, match=r"kernels=liger needs a CUDA device and .*; use kernels=auto or torch"):
        choose_kernels(Kernels.liger, device)


@pytest.mark.parametrize("missing", ["liger_kernel", "triton", None])
def test_liger_needs_itself_and_triton(monkeypatch, missing):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None if name == missing else name)
    assert liger_available() is (missing is None)


def fused_rotary(*args, **kwargs):
    raise AssertionError("only named, never called")


@pytest.fixture
def stand_in(monkeypatch):
    """A stand-in for Liger's entry point that patches what Liger patches: globals, a class and the instance."""

    def patch(model, **switches):
        assert switches == {"cross_entropy": False, "fused_linear_cross_entropy": False}
        modeling_llama.apply_rotary_pos_emb = fused_rotary
        modeling_llama.LlamaRMSNorm = object
        modeling_llama.something_new = 1
        type(model).forward = fused_rotary
        model.model.norm.forward = "fused"

    module = types.ModuleType("liger_kernel.transformers.monkey_patch")
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    module._apply_liger_kernel_to_instance = patch
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    before = dict(vars(modeling_llama))
    yield module
    for name in vars(modeling_llama).keys() - before.keys():
        delattr(modeling_llama, name)
    vars(modeling_llama).update(before)


def test_the_models_source_is_left_as_it_was_and_patched_only_while_layers_run(stand_in):
    skeleton = build_skeleton(TINY)
    before, forward = dict(vars(modeling_llama)), type(skeleton).forward
    fused = FusedKernels(skeleton)
    kept = {name: vars(modeling_llama)[name] for name in before}
    assert kept == before
    assert type(skeleton).forward is forward
    assert skeleton.model.norm.forward == "fused"  # the skeleton's own modules stay patched
    with contextlib.suppress(ZeroDivisionError), fused.active():
        assert modeling_llama.apply_rotary_pos_emb is fused_rotary
        assert modeling_llama.LlamaRMSNorm is before["LlamaRMSNorm"]
        raise ZeroDivisionError
    assert modeling_llama.apply_rotary_pos_emb is before["apply_rotary_pos_emb"]


def test_a_family_that_liger_does_not_know_keeps_its_own_code(stand_in):
    stand_in.MODEL_TYPE_TO_APPLY_LIGER_FN = {}
    before = dict(vars(modeling_llama))
    with FusedKernels(build_skeleton(TINY)).active():
        assert dict(vars(modeling_llama)) == before


@pytest.mark.gpu
@pytest.mark.skipif(not liger_available(), reason="needs liger-kernel")
def test_liger_itself_leaves_the_models_source_as_it_was():
    skeleton = build_skeleton(TINY)
    before, forward = dict(vars(modeling_llama)), type(skeleton).forward
    fused = FusedKernels(skeleton)
    assert {name: vars(modeling_llama)[name] for name in before} == before
    assert type(skeleton).forward is forward
    with fused.active():
        assert modeling_llama.apply_rotary_pos_emb is not before["apply_rotary_pos_emb"]
    assert modeling_llama.apply_rotary_pos_emb is before["apply_rotary_pos_emb"]
