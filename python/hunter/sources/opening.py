# SPDX-License-Identifier: MIT
"""Opens the source of packets that the command line asks for."""

from __future__ import annotations

from collections.abc import Callable

from hunter.cli.choice import filter_of
from hunter.cli.options import Choice, Origin
from hunter.sources.source import Source
from nlproto import NoDaemon
from nlproto.errors import DaemonBusy
from nlproto.filters.filter import Filter

__all__ = ["open_source"]


def open_source(
    origin: Origin,
    choice: Choice,
    filter: Filter,
    notify: Callable[[str], None],
    first_bytes: bool = False,
) -> Source:
    """Open the source that `origin` asks for, with packets that fit `filter`.

    `choice` is what `filter` was made from: its interfaces are followed. `first_bytes`: with the
    packets' first bytes.

    It is the daemon if one answers, else this process's own pipeline, unless the user named the
    daemon's socket. `notify` gets a line about each thing that makes the result worse. Raises
    Error.
    """
    source = _open(origin, filter, notify, first_bytes)
    if origin.read or not choice.interface or "any" in choice.interface:
        return source
    from hunter.sources.following import FollowingSource

    return FollowingSource(
        source, choice.interface, lambda: filter_of(choice, all_there=False), notify
    )


def _open(
    origin: Origin, filter: Filter, notify: Callable[[str], None], first_bytes: bool
) -> Source:
    # Imported here: each needs parts that the others do without.
    if origin.read:
        from hunter.sources.source_file import FileSource

        return FileSource(origin.read, filter, first_bytes)
    if origin.direct:
        from hunter.sources.source_direct import open_direct

        return open_direct(origin.engine, origin.socket, filter, notify, first_bytes, origin.buffer)
    if origin.engine == "auto":
        from hunter.sources.source_daemon import DaemonSource

        try:
            return DaemonSource(origin.socket, filter, notify, first_bytes)
        except DaemonBusy:
            raise
        except NoDaemon:
            if origin.socket_given:
                raise
    from hunter.sources.source_alone import open_alone

    return open_alone(origin.engine, filter, notify, first_bytes, origin.buffer, origin.domains)
