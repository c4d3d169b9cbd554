# SPDX-License-Identifier: MIT
"""Where the hunter's packets come from: one interface, whoever names them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

from hunter.cli.arguments import filter_of
from hunter.show.columns import Holder
from hunter.sources.interfaces import FollowingSource
from nlproto import NoDaemon
from nlproto.errors import DaemonBusy
from nlproto.filters.filter import Filter
from nlproto.pipeline.pipeline import NamedBatch
from nlproto.records.first_bytes import FirstBytes
from nlproto.tables.processes import Process

__all__ = ["Source", "open_source"]


class Source(Protocol):
    """A context manager; packets count from its construction on. One thread."""

    description: str
    """What it is, for people: "daemon", "engine packet"."""
    snaps: FirstBytes | None
    """The first bytes of packets, when they were asked for and come."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def read(self, timeout: float) -> list[NamedBatch] | None:
        """Return what fits the filter, waiting up to `timeout` s; None: it has ended by itself.

        Raises Error when it fails.
        """
        ...

    def refilter(self, filter: Filter) -> list[NamedBatch]:
        """Take another filter from now on; return what fitted the one before and is here."""
        ...

    def finish(self) -> list[NamedBatch]:
        """Stop and return the rest: every packet that was there before the call."""
        ...

    def get(self, tgid: int, start_ns: int, /) -> Process | None:
        """Return what is known of a process."""
        ...

    def holders(self, cookies: set[int]) -> Mapping[int, list[Holder]]:
        """Return who holds shared sockets."""
        ...

    def account(self) -> Mapping[str, Any] | None:
        """Return what this source saw since it was opened (nlproto.pipeline.account).

        None when this user may not know. Final once finish() has returned.
        """
        ...

    def lost(self) -> int:
        """Return how many records that fitted the filter were lost on the way to this reader."""
        ...


def open_source(
    options: argparse.Namespace, filter: Filter, notify: Callable[[str], None]
) -> Source:
    """Return the source that `options` (read, direct, socket, engine, interface) ask for.

    The daemon when one answers, else this process's own pipeline, unless the user named the
    daemon's socket. `notify` gets lines that say what is less than it could be. Raises Error.
    """
    source = _open(options, filter, notify)
    if options.read or not options.interface or "any" in options.interface:
        return source
    return FollowingSource(
        source, options.interface, lambda: filter_of(options, all_there=False), notify
    )


def _open(options: argparse.Namespace, filter: Filter, notify: Callable[[str], None]) -> Source:
    # Imported here: each needs parts that the others do without.
    snaps = getattr(options, "kind", "") == "pcapng"
    if options.read:
        from hunter.sources.source_file import FileSource

        return FileSource(options.read, filter, snaps)
    if options.direct:
        from hunter.sources.source_direct import open_direct

        return open_direct(options.engine, options.socket, filter, notify, snaps, options.buffer)
    if options.engine == "auto":
        from hunter.sources.source_daemon import DaemonSource

        try:
            return DaemonSource(options.socket, filter, notify, snaps)
        except DaemonBusy:
            raise
        except NoDaemon:
            if options.socket_given:
                raise
    from hunter.sources.source_alone import open_alone

    return open_alone(options.engine, filter, notify, snaps, options.buffer)
