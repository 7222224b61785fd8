"""Three ways to one step: a list of micro-batches, one big batch, or backward passes that add up.

    python examples/gradient_accumulation.py

A list is the cheap way: each block's weights and gradients cross the link once, however many micro-batches there are.
`forward_backward` sends both every time and keeps gradients in fp32 (4 B a parameter); use it when the batches of one
step are not known together. All weigh tokens alike, so rows may differ in how many of theirs are trained.
"""

import torch

import horizon
from horizon.engine import StepResult

MODEL = {
    "model_type": "qwen2",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_batches() -> list[dict[str, torch.Tensor]]:
    """Micro-batches of 4 rows with different numbers of trained tokens."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for num_untrained in (0, 10, 40):
        input_ids = torch.randint(128, (4, 48), generator=generator)
        labels = input_ids.clone()
        labels[:, :num_untrained] = -100
        batches.append({"input_ids": input_ids, "labels": labels})
    return batches


def train(way: str, device: str) -> tuple[StepResult, dict[str, torch.Tensor]]:
    """One step, its micro-batches taken the given way; what it reports and the weights it leaves."""
    batches = make_batches()
    optimizer = horizon.AdamW(lr=1e-3)
    # fp32 on a GPU, too: what is left to differ is the order in which gradients are summed
    with horizon.Engine.from_config(MODEL, optimizer=optimizer, device=device, compute_dtype="float32") as engine:
        if way == "list":
            result = engine.step(batches)
        elif way == "one batch":
            result = engine.step({key: torch.cat([batch[key] for batch in batches]) for key in batches[0]})
        else:
            for batch in batches:
                engine.forward_backward(batch)
            result = engine.optimizer_step()
        return result, dict(engine.named_master_parameters())


def main(device: str = "auto") -> dict[str, float]:
    """Compare; per way, the largest difference of a weight from what the list gives (a step moves them by 1e-3)."""
    expected, weights = train("list", device)
    print(f"list: loss {expected.loss:.6f} over {expected.num_tokens} tokens, gradient norm {expected.grad_norm:.6f}")
    differences = {}
    for way in ("one batch", "added up"):
        result, others = train(way, device)
        differences[way] = max(float((others[name] - weights[name]).abs().max()) for name in weights)
        print(
            f"{way}: loss {result.loss:.6f}, gradient norm {result.grad_norm:.6f}, "
            f"weights differ by {differences[way]:.1e}"
        )
    return differences


if __name__ == "__main__":
    main()
