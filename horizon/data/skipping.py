"""What happens at a record that cannot be read: the run stops, or the record is left out and counted."""

from __future__ import annotations

from horizon.config.schema import OnBadData
from horizon.errors import DataError


class BadRecords:
    """Takes the errors of single records. `count` and `first` (its message) are of those that were left out."""

    def __init__(self, on_error: OnBadData) -> None:
        self._on_error = on_error
        self.count = 0
        self.first = ""

    def note(self, error: DataError) -> None:
        """Leave the record out, or, with `data.on_error=stop`, raise its error."""
        if self._on_error is OnBadData.stop:
            raise DataError(f"{error} (data.on_error=skip leaves such records out)") from error
        self.first = self.first or str(error)
        self.count += 1
