import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

BASE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXTRA = {
    "llama": {},
    "gpt2": {},  # tied, Conv1D
    "gpt_neox": {},  # renamed on disk
    "mixtral": {"num_local_experts": 4},  # experts merged in the model
    "qwen3_moe": {"num_experts": 12, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "max_position_embeddings": 131072},
    "gemma3_text": {"head_dim": 8},
    "deepseek_v3": {  # a persistent buffer, kept in fp32
        "n_routed_experts": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "qk_nope_head_dim": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_config():
    """A small config of an architecture."""
    return lambda model_type, **changes: AutoConfig.for_model(model_type, **{**BASE, **EXTRA[model_type], **changes})


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """A small model with different random values everywhere, norms, biases and persistent buffers included."""

    def build(model_type, dtype=torch.float32, **changes):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=torch.float32)
        torch.manual_seed(0)
        with torch.no_grad():
            for tensor in {id(tensor): tensor for tensor in model.state_dict().values()}.values():
                tensor.normal_()
        return model.to(dtype)

    return build
