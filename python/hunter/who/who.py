# SPDX-License-Identifier: MIT
"""hunter who: what listens, and who owns, or owned, the traffic of a port, host or process."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from hunter.cli.options import WhoOptions
from hunter.show.console import Output
from hunter.who.behind import add_behind
from hunter.who.places import asks_for_place, in_place
from hunter.who.who_groups import show_groups, summed
from hunter.who.who_show import show
from nlproto import NoDaemon
from nlproto.client.client import DaemonClient
from nlproto.host.netns import find

__all__ = ["run"]

_FLOWS, _MAX_FLOWS = 1000, 10_000  # how many to ask for, at least and at most
_WAIT_S = 10.0  # for the first look of a daemon that has just started
_ASK_AGAIN_S = 0.2


def run(options: WhoOptions, notify: Callable[[str], None]) -> None:
    """Ask the daemon, or the kernel's own tables when there is none; print.

    Raises Error, and SystemExit(1) when nobody was found.
    """
    remembers = True
    try:
        with DaemonClient(options.socket) as client:
            answer = _ask(client, options)
            if options.port is not None:
                add_behind(client, answer)
    except NoDaemon as error:
        from hunter.who.who_now import owners_now

        past = (options.since, options.until, options.domain)
        if any(one is not None for one in past) or options.socket_given:
            raise
        notify(f"{error}; until then: present sockets of this network namespace")
        answer = owners_now(options)
        remembers = False
    if asks_for_place(options):
        answer = in_place(answer, options, notify)
    if options.json and options.by:
        print(json.dumps(summed(answer, options)))
    elif options.json:
        print(json.dumps(answer))
    elif options.by:
        show_groups(answer, Output(soft_wrap=True), time.time(), options)
    else:
        show(answer, Output(soft_wrap=True), time.time(), options, remembers)
    sys.stdout.flush()
    if not answer["owners"] and not answer["flows"]:
        raise SystemExit(1)


def _ask(client: DaemonClient, options: WhoOptions) -> dict[str, Any]:
    """Ask the daemon. One that has just started is asked again until its first look is done."""
    limit = options.limit
    if options.by or asks_for_place(options):
        limit = _MAX_FLOWS
    elif not options.json:
        limit = min(max(limit or 0, _FLOWS), _MAX_FLOWS)
    netns = None if options.netns is None else find(options.netns).netns
    end = time.monotonic() + _WAIT_S
    while True:
        answer = client.who(
            port=options.port,
            proto=options.proto,
            host=options.host,
            pid=options.pid,
            pname=options.pname,
            domain=options.domain,
            since=options.since,
            until=options.until,
            netns=netns,
            listening=options.listening or None,
            limit=limit,
        )
        if answer["complete"] or answer["owners"] or time.monotonic() > end:
            return answer
        time.sleep(_ASK_AGAIN_S)
