"""What the plan says of a step's time; made by `horizon.plan.cost`."""

from __future__ import annotations

from dataclasses import dataclass

NOTICEABLE = 0.03  # of a step: to wait for less than this is not what bounds it


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPrediction:
    """A step in steady state: what compute does and what it waits for."""

    num_tokens: int
    arithmetic_s: float  # kernels of blocks
    link_s: float  # compute waits for a copy,
    optimizer_s: float  # for an update,
    disk_s: float = 0.0  # for states on nvme,
    launch_s: float  # for the host

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.arithmetic_s + self.link_s + self.optimizer_s + self.disk_s + self.launch_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens that go through the model."""
        return self.num_tokens / self.seconds

    @property
    def bound(self) -> str:
        """What the step waits for most, or the arithmetic if it hardly waits."""
        waits = {
            "link": self.link_s, "host memory bandwidth": self.optimizer_s, "disk": self.disk_s,
            "launches": self.launch_s,
        }  # fmt: skip
        worst = max(waits, key=lambda name: waits[name])
        return worst if waits[worst] > NOTICEABLE * self.seconds else "arithmetic"

    def describe(self) -> str:
        """The prediction in a line."""
        disk = f"disk {format_seconds(self.disk_s)}, " if self.disk_s else ""
        return (
            f"predicted step {format_seconds(self.seconds)}, {self.tokens_per_s:,.0f} tokens/s, bound by {self.bound}: "
            f"arithmetic {format_seconds(self.arithmetic_s)}, waiting for link {format_seconds(self.link_s)}, "
            f"optimizer {format_seconds(self.optimizer_s)}, {disk}launches {format_seconds(self.launch_s)}"
        )


def format_seconds(value: float) -> str:
    """`value` with a unit and about three digits."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"
