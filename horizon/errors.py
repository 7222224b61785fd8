"""Named errors: every failure a user can cause or meet has one of these types and a one-line message.

A message says what was found, what was expected and which setting or file to change.
"""


class HorizonError(Exception):
    """Base of all errors that Horizon raises on purpose."""


class ConfigError(HorizonError):
    """A setting has a value that cannot work."""


class BudgetError(HorizonError):
    """Something does not fit the memory it was given; raised before it is allocated.

    Attributes:
        tier: whose bytes are too few, where the plan says so; None: the system or the device refused.
        needed: bytes that the plan asks of it.
        limit: bytes that it may have.
    """

    def __init__(self, message: str, tier: str | None = None, needed: int = 0, limit: int = 0):
        super().__init__(message)
        self.tier, self.needed, self.limit = tier, needed, limit


class TierError(HorizonError):
    """A tier lost or refused bytes it holds: a disk that is full, broken or gone."""


class UnsupportedModelError(HorizonError):
    """The architecture cannot be cut into blocks that compute what the model computes."""


class CheckpointError(HorizonError):
    """Model files are missing, damaged, or do not match the architecture."""


class DataError(HorizonError):
    """Training data is missing, empty or malformed."""


class BatchError(HorizonError):
    """A batch handed to the engine cannot be trained on."""


class CallbackError(HorizonError):
    """A callback of the user's raised an exception, which is the cause of this one."""


class NonFiniteError(HorizonError):
    """A loss or a gradient is NaN or infinite."""


def one_line(error: BaseException) -> str:
    """What went wrong, on one line; libraries put the reason behind a colon and a line break."""
    return " ".join(str(error).split()) or type(error).__name__
