"""A sweep over learning rates, one run for each, that ends with a table and a page which compare them.

    python examples/sweep_learning_rates.py

Hydra makes the runs: `horizon train -m optim.lr=1e-3,3e-3` is all it takes on a command line. The numbers of the page
are in comparison.json beside it. `horizon report FOLDER` makes both anew, of any folder with runs below it.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SENTENCES = (
    "the cat sat on the mat",
    "a dog ran over the hill",
    "seven birds sang in the tree",
    "rain fell on the roof",
)
SETTINGS = (
    "model.config.hidden_size=64",
    "model.config.intermediate_size=160",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
    "data=text",
    "data.tokenizer=bytes",
    "data.validation_fraction=0.2",
    "train.batch_size=8",
    "train.seq_len=64",
    "train.sample_tokens=0",
    "train.save=false",
    "optim.warmup_steps=5",
)


def make_texts(folder: Path, num_files: int = 20) -> None:
    """A folder of text; yours holds what you want to train on."""
    folder.mkdir()
    for number in range(num_files):
        lines = (SENTENCES[(number + i) % len(SENTENCES)] for i in range(16))
        (folder / f"{number}.txt").write_text(". ".join(lines) + ".\n", encoding="utf-8")


def main(work: Path, rates: Sequence[float] = (1e-4, 1e-3, 1e-2), steps: int = 60, device: str = "auto") -> float:
    """Sweep in `work`; the rate with the lowest validation loss."""
    make_texts(work / "texts")
    sweep = work / "sweep"
    values = [f"data.path={work / 'texts'}", f"train.steps={steps}", f"device={device}", f"hydra.sweep.dir={sweep}"]
    swept = f"optim.lr={','.join(map(str, rates))}"
    subprocess.run([sys.executable, "-m", "horizon", "train", "-m", *SETTINGS, *values, swept], check=True)

    comparison = json.loads((sweep / "comparison.json").read_text(encoding="utf-8"))
    losses = {run["settings"]["optim.lr"]: run["numbers"]["validation_loss_after"] for run in comparison["runs"]}
    for rate, loss in losses.items():
        print(f"learning rate {rate:g}: validation loss {loss:.3f}")
    return min(losses, key=lambda rate: losses[rate])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(f"best: {main(Path(folder)):g}")
