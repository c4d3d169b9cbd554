# SPDX-License-Identifier: MIT
"""hunter web: the daemon's traffic on a page of this machine, for one user."""

from __future__ import annotations

import time
from collections.abc import Callable

from hunter.cli.options import WebOptions
from hunter.cli.signals import Stop
from hunter.show.names import HostNames
from hunter.sources.source_daemon import DaemonSource
from hunter.top.going import Going
from hunter.top.state import State
from hunter.web.live import LiveRates
from hunter.web.server import PageServer
from nlproto.filters.filter import EVERYTHING

__all__ = ["run"]

_TICK_S = 1.0


def run(options: WebOptions, stop: Stop, notify: Callable[[str], None]) -> None:
    """Serve the page until a signal comes. Raises Error.

    It shows what the daemon shows to this user: the UNIX socket's rights apply.
    """
    with (
        DaemonSource(options.socket, EVERYTHING, notify) as source,
        HostNames() as known,
        Going() as going,
    ):
        live = LiveRates(State(source, known, going=going))
        with PageServer(options.port, options.socket, live) as server:
            print(server.url, flush=True)
            notify("the address has a secret: whoever has it sees what you see. Ctrl-C ends it")
            live.state.start()
            try:
                while not stop:
                    time.sleep(_TICK_S)
                    live.tick()
            finally:
                live.state.stop()
