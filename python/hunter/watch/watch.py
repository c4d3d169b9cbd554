# SPDX-License-Identifier: MIT
"""hunter watch: asks the daemon's history what is new, once or again and again."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from hunter.cli.options import NEWS, WatchOptions
from hunter.cli.signals import Stop
from hunter.show import names
from hunter.show.text import plain
from hunter.watch.webhook import Webhook
from hunter.who.who_show import place_of
from nlproto.client.client import DaemonClient
from nlproto.errors import Error, NoDaemon, UsageError

__all__ = ["line_of", "run"]

_ONCE_S = 3600.0
_ASK_S = 5.0  # between two questions
_OVERLAP_S = 120.0
"""A sighting is stored some seconds after it happened, so each question goes so far back."""
_AT_ONCE = 10_000
"""Findings in one answer."""
_TOLD = 100_000
"""Findings that are remembered, so that none is reported twice."""
_WARNING = 4
_DAY = 86_400.0

Entry = Mapping[str, Any]
_Finding = tuple[str, str, int, float]


def run(options: WatchOptions, stop: Stop, notify: Callable[[str], None]) -> int:
    """Report what is new; return 0 if there was any, 1 if not, 2 without an answer.

    Raises UsageError.
    """
    if options.unseen < _DAY:
        raise UsageError("--unseen is a day or more (1d)")
    with contextlib.ExitStack() as stack:
        tell = [_printer(options)]
        webhook = None
        if options.webhook is not None:
            webhook = stack.enter_context(Webhook(options.webhook, notify))
            tell.append(webhook.put)
        try:
            found = 0
            for one in _findings(options, stop, notify):
                found += 1
                for each in tell:
                    each(one)
        except Error as error:
            if isinstance(error, UsageError):
                raise
            notify(str(error))
            return 2
        if webhook is not None and not webhook.finish():
            return 2
    return 0 if found else 1


def _findings(options: WatchOptions, stop: Stop, notify: Callable[[str], None]) -> Iterator[Entry]:
    since = options.since if options.since is not None else _ONCE_S if options.once else 0.0
    begin = time.time() - since
    told: dict[_Finding, None] = {}
    first, warned = True, False
    while not stop:
        try:
            with DaemonClient(options.socket) as client:
                warned = False
                while not stop:
                    for answer in _ask(client, options, begin):
                        if first:
                            first = False
                            _tell_horizon(answer["since"], begin, options.unseen, notify)
                        yield from _new(answer, told)
                    if options.once:
                        return
                    begin = max(begin, time.time() - _OVERLAP_S)
                    _wait(stop)
        except NoDaemon as error:
            if options.once or first:
                raise
            if not warned:
                notify(f"{error}; waiting for it")
            warned = True
            _wait(stop)


def _ask(client: DaemonClient, options: WatchOptions, begin: float) -> Iterator[Entry]:
    for kind in dict.fromkeys(options.kinds) or NEWS:
        after = None
        while True:
            since = max(0.0, time.time() - begin)
            answer = client.news(
                kind, since=since, unseen=options.unseen, limit=_AT_ONCE, after=after
            )
            yield answer
            after = answer["next"]
            if after is None:
                break


def _new(answer: Entry, told: dict[_Finding, None]) -> Iterator[Entry]:
    processes = {(one["tgid"], one["start_ns"]): one for one in answer["processes"]}
    for one in answer["news"]:
        key = (one["kind"], one["name"], one["uid"], one["first"])
        if key in told:
            continue
        told[key] = None
        if len(told) > _TOLD:
            del told[next(iter(told))]
        yield {**one, "process": processes.get((one["pid"], one["start_ns"]))}


def _tell_horizon(since: float, begin: float, unseen: float, notify: Callable[[str], None]) -> None:
    if since > begin - unseen:
        moment = datetime.fromtimestamp(since)
        notify(f"what is new is known since {moment:%Y-%m-%d %H:%M}: nothing is known of before")


def _wait(stop: Stop) -> None:
    end = time.monotonic() + _ASK_S
    while not stop and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))


def _printer(options: WatchOptions) -> Callable[[Entry], None]:
    def put(one: Entry) -> None:
        if options.journal:
            print(f"<{_WARNING}>{line_of(one)}", file=sys.stderr, flush=True)
        if options.json:
            print(json.dumps(one), flush=True)
        elif not options.journal:
            moment = datetime.fromtimestamp(one["first"])
            print(f"{moment:%Y-%m-%d %H:%M:%S} {line_of(one)}", flush=True)

    return put


def line_of(one: Entry) -> str:
    """Return a finding in one line; names in it are harmless."""
    process = one["process"] or {}
    comm = process.get("comm", "")
    words = ["new", one["kind"], plain(one["name"] if one["kind"] != "listener" else one["about"])]
    if one["kind"] == "destination":
        words.append(plain(one["about"]))
    words.append(f"by {plain(comm) or 'pid'}.{one['pid']}")
    words.append(f"of {plain(names.user(one['uid']))}")
    if process and (place := place_of(process)):
        words.append(f"in {plain(place)}")
    if process.get("exe"):
        words.append(f"({plain(process['exe'])})")
    if one["before"] is not None:
        words.append(f"last seen {datetime.fromtimestamp(one['before']):%Y-%m-%d}")
    return " ".join(words)
