# SPDX-License-Identifier: MIT
"""The interface of all sources of packets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

from hunter.show.columns import Holder
from nlproto.filters.filter import Filter
from nlproto.records.batch import NamedBatch
from nlproto.records.ends import Ends
from nlproto.records.first_bytes import FirstBytes
from nlproto.tables.processes import Process

__all__ = ["Source"]


class Source(Protocol):
    """A context manager. Packets count from its construction on. For one thread."""

    description: str
    """Its name for people: "daemon", "engine packet"."""
    first_bytes: FirstBytes | None
    """The first bytes of packets, if they were asked for and come."""

    @property
    def ends(self) -> Ends:
        """Names of far ends."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def read(self, timeout: float) -> list[NamedBatch] | None:
        """Return what fits the filter, waiting up to `timeout` s; None: the source has ended.

        Raises Error if it fails.
        """
        ...

    def refilter(self, filter: Filter) -> list[NamedBatch]:
        """Use another filter from now on. Returns what fitted the old one and is here."""
        ...

    def finish(self) -> list[NamedBatch]:
        """Stop, and return the rest: every packet from before the call."""
        ...

    def get(self, tgid: int, start_ns: int, /) -> Process | None:
        """Return what is known of a process."""
        ...

    def holders(self, cookies: set[int]) -> Mapping[int, list[Holder]]:
        """Return the holders of shared sockets."""
        ...

    def account(self) -> Mapping[str, Any] | None:
        """Return what this source saw since it was opened (nlproto.pipeline.account).

        None when this user may not know. Final once finish() has returned.
        """
        ...

    def lost(self) -> int:
        """Return how many records that fitted the filter were lost on the way to this reader."""
        ...
