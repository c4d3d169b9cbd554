# SPDX-License-Identifier: MIT
"""What is known of far ends, as a given user may see it."""

from __future__ import annotations

import numpy as np

from nlproto.overheard.domains import Domains
from nlproto.overheard.names import is_of_resolver
from nlproto.overheard.translations import Translations
from nlproto.records.ends import FlowKey, Translated, record_keys

__all__ = ["LiveEnds"]


class LiveEnds:
    """What this process has heard. `own` leaves out names that resolvers asked for."""

    def __init__(
        self, domains: Domains, became: Translations | None = None, own: bool = False
    ) -> None:
        self._domains = domains
        self._became = became
        self._own = own

    def for_own(self) -> LiveEnds:
        """Return what a user may know who sees only their own packets."""
        return LiveEnds(self._domains, self._became, own=True)

    def domains(self, records: np.ndarray) -> list[str]:
        """See Ends."""
        if not self._domains.any_named:
            return [""] * len(records)
        return [self.domain_of(key) for key in record_keys(records)]

    def domain_of(self, key: FlowKey) -> str:
        """See Ends."""
        return self.text(self._domains.number_of(key))

    def translations(self, records: np.ndarray) -> np.ndarray | None:
        """See Ends."""
        return None if self._became is None else self._became.of_records(records)

    def translated(self, flows: np.ndarray) -> dict[FlowKey, Translated]:
        """See Ends."""
        return {} if self._became is None else self._became.of_flows(flows)

    def text(self, number: int) -> str:
        """See Ends."""
        if not number or self._own and is_of_resolver(number):
            return ""
        return self._domains.names.text(number)
