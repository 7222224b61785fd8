"""Continued pre-training: go on training a model on a folder of your own texts, as `horizon train` does it.

    python examples/pretrain_folder.py

`horizon train model.path=FOLDER data=text data.path=TEXTS` does the same without a script. So that it runs anywhere, a
tiny model and a folder of texts, this machine's own copy of Python's json package, are first made.
"""

import json
import shutil
import tempfile
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

import horizon
from horizon.config.schema import DataConfig, DataFormat, HorizonConfig, ModelConfig, OptimConfig, TrainConfig
from horizon.data.tokenizer import byte_tokenizer


def make_model(folder: Path) -> None:
    """A model folder with its tokenizer; yours is a download."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def make_texts(folder: Path) -> None:
    """A folder of text files, in folders of its own or not."""
    shutil.copytree(Path(json.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))


def main(work: Path, steps: int = 60, device: str = "auto") -> tuple[float, float]:
    """Train `work`/base on `work`/texts; the loss on held-out text before and after."""
    make_model(work / "base")
    make_texts(work / "texts")
    settings = HorizonConfig(
        model=ModelConfig(path=str(work / "base")),
        data=DataConfig(
            format=DataFormat.text,
            path=str(work / "texts"),
            validation_fraction=0.2,  # of the files
            cache=str(work / "cache"),  # tokenized text, for the next run; by default in your cache folder
        ),
        train=TrainConfig(steps=steps, seq_len=128, tokens_per_step=1024),
        optim=OptimConfig(lr=3e-3, warmup_steps=5),
        device=device,
    )
    summary = horizon.Trainer(settings, work / "run").run()
    assert summary.validation_loss_before is not None and summary.validation_loss_after is not None
    return summary.validation_loss_before, summary.validation_loss_after


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        before, after = main(Path(folder))
        print(f"held-out loss: {before:.3f} before, {after:.3f} after")
