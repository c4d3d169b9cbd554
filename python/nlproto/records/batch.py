# SPDX-License-Identifier: MIT
"""Records with their owners: what the pipeline delivers and the daemon's clients receive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlproto.records.clock import Clock

__all__ = ["NamedBatch"]


@dataclass(frozen=True, slots=True)
class NamedBatch:
    """Records with their owners, in order of time. Several batches of the engine become one."""

    head: np.void
    """BATCH of the last one: its clocks are right for all, its counters for its CPU alone."""
    records: np.ndarray
    """RECORD. Subscribers share it, and must not write to it. Empty if the engine sent flows."""
    clock: Clock
    flows: np.ndarray | None = None
    """Sums of the records (nlproto.tables.flows.FLOW), if the pipeline made this batch."""
