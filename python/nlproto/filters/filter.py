# SPDX-License-Identifier: MIT
"""A filter: which records it wants, its cost, and its text form.

The text form has only numbers, so it means the same in another program. Two filters with the same
text form are the same filter. nlproto.filters.parse makes a filter from text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlproto.filters.nodes import Chain, Node
from nlproto.filters.view import FilterView, KnownProcesses

__all__ = ["EVERYTHING", "Filter"]


@dataclass(frozen=True, slots=True)
class Filter:
    """A parsed filter; `str()` is its text form, "" matches everything."""

    root: Node | None

    def __str__(self) -> str:
        return "" if self.root is None else str(self.root)

    @property
    def cost(self) -> int:
        """How many tests it makes; a name counts as NAME_COST."""
        return 0 if self.root is None else self.root.cost

    def mask(self, records: np.ndarray, details: KnownProcesses | None = None) -> np.ndarray:
        """Return one bool a record of `records` (RECORD, shape (n,)).

        The words of NAME_WORDS ask `details` once for each process. Without `details` they see only
        what the record says.
        """
        if self.root is None:
            return np.ones(len(records), bool)
        if not len(records):
            return np.zeros(0, bool)
        return self.root.mask(FilterView(records, details))

    def __and__(self, other: Filter) -> Filter:
        """Return a filter that wants what both want."""
        if self.root is None or other.root is None:
            return other if self.root is None else self
        return Filter(Chain(self.root, (("and", other.root),)))


EVERYTHING = Filter(None)
"""Wants each record."""
