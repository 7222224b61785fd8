"""The resident model that streamed training must equal: tiny transformers models and a plain training loop.

Nothing here knows how Horizon works, but for two things that the comparison fixes from outside: the seeds of dropout
masks (`replay_masks`) and, for tied embeddings, the order in which their gradients are summed (`Resident`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import horizon
from horizon.stream.randomness import _mix

Batch = dict[str, Tensor]

VOCAB, ROWS, TOKENS = 96, 2, 12
LR, MAX_GRAD_NORM = 1e-2, 0.5  # below the gradient norm of every model here: clipping takes part

# Numbers of elements are multiples of 16: in the rest of a tensor torch's fused AdamW rounds otherwise than before it.
BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BOTH_KINDS = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}  # shorter than a row
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
    "num_key_value_heads": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
}  # fmt: skip
NO_DROPOUT = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"dropout": 0.0},
    "gpt_neo": {"attention_dropout": 0.0, "embed_dropout": 0.0, "resid_dropout": 0.0},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 5},
    "gemma2": {"head_dim": 8, **BOTH_KINDS},
    "gemma3_text": {"head_dim": 8, **BOTH_KINDS},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8},
    "gpt_oss": {
        "num_attention_heads": 16, "head_dim": 8, "num_local_experts": 16, **BOTH_KINDS,
        "max_position_embeddings": 131072,
    },
    # what follows differs from layer to layer, around the layers, or in its buffers
    "gpt2, scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["local", "global"], 1]], "window_size": 5},
    "cohere2": {"logit_scale": 0.5, **BOTH_KINDS},
    "smollm3": {"no_rope_layers": [1, 0]},
    "deepseek_v3": {**MLA, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "falcon": {},
    "gpt_neox": {},
    "bloom": {},
    "starcoder2": {"sliding_window": 5},
    "stablelm": {},
}  # fmt: skip
NO_POSITIONS = ("bloom",)  # take no position_ids: rows cannot be packed
CROSSING = ("opt", "gpt_oss", "falcon")  # transformers alone lets their packed documents see each other


def build(family: str, **changes: Any) -> Any:
    """A tiny fp32 model in which no two parameters, norms and biases included, hold the same values."""
    name = family.split(",")[0]
    settings = {**BASE, **NO_DROPOUT.get(name, {}), **FAMILIES[family], **changes}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def is_tied(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def plain(seed: int, rows: int = ROWS, tokens: int = TOKENS) -> Batch:
    """Every token trained, no mask."""
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def padded(seed: int, lengths: Sequence[int], side: str = "right", tokens: int = TOKENS) -> Batch:
    """Rows of these lengths, padded on one side; padding is masked and not trained."""
    batch = plain(seed, len(lengths), tokens)
    steps, size = torch.arange(tokens), torch.tensor(lengths)[:, None]
    real = steps < size if side == "right" else steps >= tokens - size
    return {
        "input_ids": batch["input_ids"].where(real, torch.tensor(0)),
        "labels": batch["labels"].where(real, torch.tensor(-100)),
        "attention_mask": real.long(),
    }


def packed(seed: int, rows: Sequence[Sequence[int]]) -> Batch:
    """Rows of documents of these lengths; position ids restart, and no document predicts the next one's first token."""
    batch = plain(seed, len(rows), sum(rows[0]))
    batch["position_ids"] = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    batch["labels"][batch["position_ids"] == 0] = -100
    return batch


def prompted(seed: int, trained: int) -> Batch:
    """Only the last `trained` tokens of each row are trained."""
    batch = plain(seed)
    batch["labels"][:, :-trained] = -100
    return batch


def num_trained(batches: Sequence[Batch]) -> int:
    """Targets that are not ignored, after the shift."""
    return sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)


@dataclass(frozen=True)
class Outcome:
    """What one step left behind, by parameter name."""

    loss: float
    grad_norm: float
    gradients: dict[str, Tensor]  # before clipping
    weights: dict[str, Tensor]


class Resident:
    """A copy of the model, all of it in memory, trained the ordinary way.

    Args:
        head_first: sum a tied embedding's gradients as streaming does: the head's share of all micro-batches, then
            the embedding's of each. Plain training sums (head + embedding) per micro-batch; that rounds otherwise.
    """

    def __init__(self, model: Any, lr: float = LR, max_grad_norm: float = MAX_GRAD_NORM, head_first: bool = True):
        self.model = copy.deepcopy(model).train()
        self.max_grad_norm = max_grad_norm
        self.named = dict(self.model.named_parameters())
        trained = {n: p for n, p in self.named.items() if p.requires_grad}
        decayed = [p for n, p in trained.items() if self._decays(n, p)]
        others = [p for n, p in trained.items() if not self._decays(n, p)]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=True)
        self._embedding = self.model.get_input_embeddings().weight
        self._head: nn.Parameter | None = None
        if head_first and is_tied(self.model) and self._embedding.requires_grad:
            self._head = nn.Parameter(self._embedding.detach().clone())
            self.model.get_output_embeddings().weight = self._head

    def _decays(self, name: str, parameter: Tensor) -> bool:
        is_norm = "Norm" in type(self.model.get_submodule(name.rpartition(".")[0])).__name__
        return parameter.dim() > 1 and not is_norm and not name.endswith("bias")

    def backward(self, batches: Sequence[Batch], seed: int | None = None) -> float:
        """The step's loss; gradients stay in the parameters.

        Args:
            seed: of the pass whose dropout masks to draw.
        """
        total, loss, shares = torch.tensor(num_trained(batches)), torch.zeros(()), []
        for m, batch in enumerate(batches):
            with replay_masks(self.model, seed, m):
                part = self.model(**batch, num_items_in_batch=total, use_cache=False).loss
            part.backward()
            loss += part.detach()
            if self._head is not None:
                shares.append(self._embedding.grad)
                self._embedding.grad = None
        if self._head is not None:
            self._embedding.grad = sum(shares, start=self._head.grad)
            self._head.grad = None
        return float(loss)

    def step(self, batches: Sequence[Batch], seed: int | None = None) -> Outcome:
        """Forward, backward, clip, update."""
        loss, gradients = self.backward(batches, seed), self.gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._head is not None:
            self._head.data.copy_(self._embedding.data)
        return Outcome(loss, float(norm), gradients, self.weights())

    def gradients(self) -> dict[str, Tensor]:
        return {n: p.grad.clone() for n, p in self.named.items() if p.requires_grad}

    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.named.items()}


@contextmanager
def replay_masks(model: Any, seed: int | None, micro_batch: int) -> Iterator[None]:
    """While open, every block of `model` draws the random numbers that the executor gives that block."""
    if seed is None:
        yield
        return
    depth = model.config.num_hidden_layers
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    handles = [
        module.register_forward_pre_hook(lambda *_, b=block: torch.manual_seed(_mix(seed, b, micro_batch)) and None)
        for block, module in enumerate([model, *layers])
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def engine_for(model: Any, **settings: Any) -> horizon.Engine:
    """An engine that computes in fp32 on the CPU, with the optimizer of `Resident`."""
    defaults = {
        "optimizer": horizon.AdamW(lr=LR), "max_grad_norm": MAX_GRAD_NORM, "device": "cpu",
        "compute_dtype": "float32", "self_check": False,
    }  # fmt: skip
    return horizon.Engine.from_pretrained(model, **{**defaults, **settings})


def streamed_step(engine: horizon.Engine, batches: Sequence[Batch]) -> Outcome:
    """One step of the engine, with everything it can tell by name."""
    result = engine.step(list(batches))
    return outcome(engine, result)


def outcome(engine: horizon.Engine, result: horizon.StepResult) -> Outcome:
    gradients = dict(engine.named_gradients())
    return Outcome(result.loss, result.grad_norm, gradients, dict(engine.named_master_parameters()))


def assert_same(found: Outcome, expected: Outcome, what: str = "") -> None:
    """Bit-equal loss, norm, gradients and weights, by name."""
    assert_same_tensors(found.gradients, expected.gradients, f"{what} gradient")
    assert (found.loss, found.grad_norm) == (expected.loss, expected.grad_norm), what
    assert_same_tensors(found.weights, expected.weights, f"{what} weight")


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    """The same names in the same order, and bit-equal values."""
    assert list(found) == list(expected), what
    bad = [name for name in expected if not torch.equal(found[name], expected[name])]
    worst = {name: float((found[name] - expected[name]).abs().max()) for name in bad}
    assert not bad, f"{what}: {len(bad)} of {len(expected)} differ, largest differences {worst}"


def assert_close_tensors(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, what: str = ""
) -> None:
    """The same names in the same order; every element within `tolerance` of its tensor's largest."""
    assert list(found) == list(expected), what
    for name, value in expected.items():
        limit = tolerance * float(value.abs().max())
        difference = float((found[name] - value).abs().max())
        assert difference <= limit, f"{what} {name} is off by {difference:.2e}, allowed {limit:.2e}"


def assert_trains_the_same(model: Any, steps: Sequence[Sequence[Batch]], **settings: Any) -> list[Outcome]:
    """Streamed and resident training agree bit for bit after each step; gives the steps' outcomes."""
    resident, outcomes = Resident(model), []
    with engine_for(model, **settings) as engine:
        for number, batches in enumerate(steps, start=1):
            outcomes.append(streamed_step(engine, batches))
            assert_same(outcomes[-1], resident.step(batches), f"step {number}")
    return outcomes
