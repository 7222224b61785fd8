"""The optimizer: AdamW on the split master, applied by host threads block after block."""

from horizon.optim.adamw import AdamW
from horizon.optim.clipping import Clipping, clip_scale, global_norm
from horizon.optim.schedule import learning_rate
from horizon.optim.states import UpdateStates
from horizon.optim.threads import default_num_threads
from horizon.optim.updater import Updater

__all__ = [
    "AdamW",
    "Clipping",
    "UpdateStates",
    "Updater",
    "clip_scale",
    "default_num_threads",
    "global_norm",
    "learning_rate",
]
