"""Tiny models with a LoRA adapter in peft's layers."""

from typing import Any

import pytest
import torch

from tests.parity.reference import build

peft = pytest.importorskip("peft")


def adapted(family: str = "llama", base: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A `PeftModel` of `build(family, **base)` whose adapter does something already."""
    torch.manual_seed(1)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[family], "task_type": "CAUSAL_LM", **changes}
    model = peft.get_peft_model(build(family, **(base or {})), peft.LoraConfig(**lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.train()


TARGETS = {
    "llama": "all-linear",
    "gemma2": "all-linear",
    "gpt2": ["c_attn", "c_proj"],  # not nn.Linear, but its transpose
    "opt": ["q_proj", "fc1", "fc2"],
    "mixtral": ["q_proj", "v_proj"],  # its experts are no linear layers
}
