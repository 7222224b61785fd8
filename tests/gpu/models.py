"""Small models, batches and engines for tests on a GPU. Nothing is computed when this is imported."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import horizon

DEVICE = "cuda"
VOCAB, ROWS, TOKENS = 128, 2, 32
BASE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mixtral": {"num_local_experts": 4},
}
EAGER = {"attn_implementation": "eager"}  # plain matrix products: the same bits every time, unlike fused backwards


def build(family: str, **changes: Any) -> Any:
    """A small fp32 model on the CPU whose values bf16 holds exactly, no two parameters alike."""
    settings = {**BASE, **FAMILIES[family], **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family.split(",")[0], **settings), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
    return model.train()


def resident(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A copy of the model on the GPU, its parameters in `dtype`, its buffers as they are."""
    found = copy.deepcopy(model)
    for parameter in found.parameters():
        parameter.data = parameter.data.to(dtype)
    return found.to(DEVICE)


def batches(
    num: int = 1, rows: int = ROWS, tokens: int = TOKENS, vocab: int = VOCAB, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Micro-batches whose every token is trained."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (num, rows, tokens), generator=generator)
    return [{"input_ids": part, "labels": part.clone()} for part in ids]


def padded() -> list[dict[str, Tensor]]:
    """One micro-batch whose rows have different lengths."""
    (batch,) = batches()
    real = torch.arange(TOKENS) < torch.tensor([[TOKENS], [TOKENS // 2]])
    return [
        {
            "input_ids": batch["input_ids"].where(real, 0),
            "labels": batch["labels"].where(real, -100),
            "attention_mask": real.long(),
        }
    ]


def engine(model: Any, **settings: Any) -> horizon.Engine:
    """An engine on the GPU with torch's kernels and all states on the host, unless told otherwise."""
    defaults = {"optimizer": horizon.AdamW(lr=1e-2), "device": DEVICE, "kernels": "torch", "self_check": False}
    memory = settings.pop("memory", horizon.MemoryConfig())
    if memory.policy == "auto" and memory.hbm_blocks is None:
        memory = replace(memory, policy="dram")  # models as small as these would all move to HBM
    return horizon.Engine.from_pretrained(model, memory=memory, **{**defaults, **settings})


def plain_gradients(model: Any, step: Sequence[dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by name of ordinary forward and backward passes over the step's micro-batches."""
    trained = torch.tensor(sum(int((b["labels"][:, 1:] != -100).sum()) for b in step), device=DEVICE)
    loss = 0.0
    for batch in step:
        on_device = {key: value.to(DEVICE) for key, value in batch.items()}
        part = model(**on_device, num_items_in_batch=trained, use_cache=False).loss
        part.backward()
        loss += float(part.detach())
    return loss, {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def gradients(engine: horizon.Engine, step: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients by name of one backward pass, no update, whatever their values are."""
    runtime = engine._runtime
    prepared = engine._prepare(list(step), True)
    runtime.guarded(lambda: runtime.accumulate(prepared, 0, 0.0, None))
    return dict(runtime.read_gradients())


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """The same names, and values that differ by at most `tolerance` of a tensor's largest element."""
    assert found.keys() == expected.keys()
    worst = {n: float((found[n] - g).abs().max() / g.abs().max().clamp_min(1e-12)) for n, g in expected.items()}
    bad = {name: value for name, value in worst.items() if not value <= tolerance}
    assert not bad, f"differences relative to the largest element: {bad}"


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not bit-equal."""
    assert found.keys() == expected.keys()
    return [name for name, value in expected.items() if not torch.equal(found[name], value)]
