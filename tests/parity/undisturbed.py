"""Steps of a deeper model that follow each other at once, and disks that are slow: what tests of placements share."""

import random
import time

from horizon.store import disk
from tests.parity.reference import Batch, assert_same_tensors, build, padded, plain, prompted

DEPTH = 4


def deep(tied: bool, **changes):
    return build("llama", num_hidden_layers=DEPTH, tie_word_embeddings=tied, **changes)


def steps() -> list[list[Batch]]:
    """Three steps of two micro-batches, and one of a single one."""
    return [*([padded(seed, [12, 7]), prompted(seed + 10, trained=3)] for seed in range(3)), [plain(7)]]


def undisturbed(engine):
    """Losses and norms of the steps, in between which nobody waits for updates, and the weights after them."""
    done = [engine.step(batches) for batches in steps()]
    return [(result.loss, result.grad_norm) for result in done], dict(engine.named_master_parameters())


def assert_alike(found, expected) -> None:
    """The same numbers and, bit for bit, the same weights."""
    assert found[0] == expected[0]
    assert_same_tensors(found[1], expected[1])


class SlowFile(disk.DirectFile):
    """Delays every move, differently each time."""

    delays = random.Random(1)

    def read(self, place, offset, into):
        time.sleep(self.delays.random() * 0.003)
        super().read(place, offset, into)

    def write(self, place, offset, data):
        time.sleep(self.delays.random() * 0.003)
        super().write(place, offset, data)
