# SPDX-License-Identifier: MIT
"""Records with their owners: what the pipeline gives and the daemon's clients get."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlproto.records.clock import Clock

__all__ = ["NamedBatch"]


@dataclass(frozen=True, slots=True)
class NamedBatch:
    """Records with their owners, in order of time; several batches of the engine made one."""

    head: np.void
    """BATCH of the last one. Its clocks are right for all, its counters for its CPU alone."""
    records: np.ndarray
    """RECORD; not to be written by subscribers, who share it. None where flows came."""
    clock: Clock
    flows: np.ndarray | None = None
    """The records summed up (nlproto.tables.flows.FLOW), when the pipeline made this batch."""
