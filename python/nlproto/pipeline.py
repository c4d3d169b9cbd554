# SPDX-License-Identifier: MIT
"""Engine -> receiver thread -> MessageQueue -> worker thread -> subscribers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nlproto.clock import Clock

__all__ = ["NamedBatch", "Pipeline"]


@dataclass(frozen=True, slots=True)
class NamedBatch:
    """Records with their owners; one batch of the engine or several that had to wait."""

    head: np.void
    """BATCH of the last one; its clocks are right for all, its counters for its CPU alone."""
    records: np.ndarray
    """RECORD, in order of time within each CPU."""
    clock: Clock


class Pipeline:
    """See below: constructor and methods are final, the body follows."""

    def subscribe(self, take: Callable[[NamedBatch], None]) -> Callable[[], None]:
        """Call `take` in the worker thread for each batch; returns the function that ends it."""
        raise NotImplementedError
