"""Supervised fine-tuning on conversations, with the data package in a loop of your own.

    python examples/sft_messages.py

`horizon train data=messages data.path=FILE.jsonl` does the same without a script. The tokenizer's chat template turns
each conversation into text; only what the assistant says, its end-of-turn token included, is trained on.
"""

import json
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

import horizon
from horizon.config.schema import DataConfig, DataFormat
from horizon.data import Loader, load_data
from horizon.data.tokenizer import byte_tokenizer

FACTS = {"the sky": "blue", "grass": "green", "snow": "white", "coal": "black", "a lemon": "yellow", "blood": "red"}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def question(thing: str) -> dict[str, str]:
    """What the user asks."""
    return {"role": "user", "content": f"What colour is {thing}?"}


def make_files(work: Path) -> None:
    """A JSONL with a conversation a line, and a tokenizer with a chat template; yours come with your model."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(work / "tokenizer")
    replies = [[question(thing), {"role": "assistant", "content": colour}] for thing, colour in FACTS.items()]
    lines = [json.dumps({"messages": messages}) for messages in replies]
    (work / "chats.jsonl").write_text("\n".join(lines * 8) + "\n", encoding="utf-8")


def main(work: Path, steps: int = 80, device: str = "auto") -> dict[str, str]:
    """Train in `work`; what the model then answers, by thing."""
    make_files(work)
    settings = DataConfig(format=DataFormat.messages, path=str(work / "chats.jsonl"), tokenizer=str(work / "tokenizer"))
    data = load_data(settings, seq_len=128, seed=0)
    print(data.summary)
    tokenizer, loader = data.tokenizer, Loader(data.train, batch_size=8, micro_batch=4, seed=0)
    first = data.train.batch([0])
    print(f"trained on, in the first row: {tokenizer.decode(first['labels'][first['labels'] != -100])!r}")

    with horizon.Engine.from_config(
        {**MODEL, "vocab_size": len(tokenizer)}, optimizer=horizon.AdamW(lr=3e-3), device=device
    ) as engine:
        for step in range(1, steps + 1):
            result = engine.step(loader.next_step())  # a list of micro-batches
            if step % 20 == 0:
                print(f"step {step}: loss {result.loss:.3f} over {result.num_tokens} trained tokens")
        return {thing: answer(engine, tokenizer, thing) for thing in FACTS}


def answer(engine: horizon.Engine, tokenizer: PreTrainedTokenizerBase, thing: str) -> str:
    """The likeliest reply, up to its end-of-turn token."""
    text = tokenizer.apply_chat_template([question(thing)], tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text)
    num_prompt = len(ids)
    while len(ids) < num_prompt + 8 and tokenizer.decode(ids[-1:]) != "<|im_end|>":
        ids.append(int(engine.next_token_logits({"input_ids": torch.tensor([ids])}).argmax()))
    return tokenizer.decode(ids[num_prompt:], skip_special_tokens=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for thing, colour in main(Path(folder)).items():
            print(f"What colour is {thing}? {colour}")
