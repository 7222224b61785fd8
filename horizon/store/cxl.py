"""The cxl tier of this machine, as the settings ask for it."""

from __future__ import annotations

import logging

from horizon.config.schema import MemoryConfig
from horizon.plan.cxl import CxlTier, read_cxl
from horizon.plan.topology import read_topology
from horizon.store.numa import bindable

log = logging.getLogger(__name__)


def find_cxl(memory: MemoryConfig) -> CxlTier:
    """The tier, on the nodes that are found here; the log says what it is.

    Raises:
        ConfigError: the machine does not have it, or settings contradict each other.
    """
    cxl = read_cxl(memory, read_topology(), bindable())
    if cxl.simulated:
        log.warning(cxl.describe())
    elif cxl.num_bytes:
        log.info(cxl.describe())
    return cxl
