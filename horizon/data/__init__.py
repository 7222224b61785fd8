"""Text -> rows of tokens -> the steps a run trains on."""

from horizon.data.load import TextData, load_data, load_run_data
from horizon.data.loader import Loader
from horizon.data.rows import Rows

__all__ = ["Loader", "Rows", "TextData", "load_data", "load_run_data"]
