"""What `forward_backward` passes have left for `optimizer_step`; their gradients themselves wait in the runtime."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from horizon.stream.batch import MicroBatch


@dataclass(frozen=True, slots=True)
class Waiting:
    """Passes whose gradients wait, averaged by trained tokens."""

    num_tokens: int = 0
    loss: float = 0.0  # mean over them
    batches: list[MicroBatch] = field(default_factory=list)  # of the last pass, or of the first with a bad loss

    def share_beside(self, num_tokens: int) -> float:
        """The weight of what waits beside a pass of so many trained tokens."""
        return self.num_tokens / (self.num_tokens + num_tokens)

    def joined(self, num_tokens: int, loss: float, batches: list[MicroBatch]) -> Waiting:
        """This, and one pass more."""
        share = self.share_beside(num_tokens)
        mean = self.loss * share + loss * (1 - share)
        return Waiting(self.num_tokens + num_tokens, mean, batches if math.isfinite(self.loss) else self.batches)
