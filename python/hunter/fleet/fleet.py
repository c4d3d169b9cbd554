# SPDX-License-Identifier: MIT
"""hunter fleet: asks a store, or this machine's own history. Needs the extra `fleet`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hunter.cli.choice import fleet_filter
from hunter.cli.options import FleetOptions
from hunter.fleet import page, show
from hunter.save.capturefile import CaptureFile
from hunter.show.console import Output
from nlproto.errors import Error

if TYPE_CHECKING:
    from fleet.ask.store import Range
    from fleet.ask.wanted import Wanted

__all__ = ["run"]

_STORE = Path("/var/lib/packet-hunter-collect")
_ROWS, _JSON_ROWS = 50, 1000
_EXTRA = "pip install 'packet-hunter[fleet]' (Debian: packet-hunter-fleet)"
_MOST = 20_000
"""Edges in the table of a page."""


def run(options: FleetOptions, notify: Callable[[str], None]) -> int:
    """Ask and print; 1 when nothing is found. Raises Error."""
    try:
        from fleet.ask.ends import ends
        from fleet.ask.hosts import hosts_of
        from fleet.ask.map import service_map
        from fleet.ask.questions import new, usage, who
        from fleet.ask.store import FlowStore, ask
        from fleet.ask.wanted import Wanted
    except ModuleNotFoundError as error:
        ours = (error.name or "").partition(".")[0] in ("fleet", "hunter", "nlproto")
        if ours and error.name != "fleet":  # that one a package of its own has
            raise
        raise Error(f"no module {error.name}: {_EXTRA}") from None
    wanted = Wanted(fleet_filter(options), options.on, options.host, options.user)
    limit = options.limit or (_JSON_ROWS if options.json else _ROWS)

    def answer(store: FlowStore) -> tuple[int, list[dict[str, Any]]]:
        match options.question:
            case "who":
                return who(store, wanted, limit)
            case "usage":
                return usage(store, wanted, options.by or "process", limit)
            case "new":
                return new(store, wanted, options.of, _earlier(options, store.range), limit)
            case "map":
                most = _MOST if options.html else limit
                return service_map(store, wanted, options.by or "process", most)
            case _:
                return ends(store, wanted, limit)

    (total, rows), hosts, truncated, range = ask(
        _opener(options, wanted, notify),
        lambda store: (answer(store), hosts_of(store), store.truncated, store.range),
    )
    incomplete = [one for one in hosts if not one.whole]
    if options.html:
        with CaptureFile(options.html) as output:
            output.write(page.of_map(rows, range, hosts).encode("utf-8", "backslashreplace"))
    if options.json:
        print(
            json.dumps(
                {
                    "question": options.question,
                    "since_ns": range.since_ns,
                    "until_ns": range.until_ns,
                    "total": total,
                    "rows": rows,
                    "hosts": len(hosts),
                    "partial": [
                        {"host": one.name, "silent_s": one.silent_s, "lost": one.lost}
                        for one in incomplete
                    ],
                    "truncated": truncated or total > len(rows),
                }
            )
        )
    elif not options.html:
        console = Output(soft_wrap=True)
        show.rows(console, options, rows)
        show.closing(console, total, len(rows), hosts, truncated)
    return 0 if rows else 1


def _earlier(options: FleetOptions, range: Range) -> int:
    """Since when what was seen is not new, in ns since 1970."""
    return range.since_ns - options.days * 86_400 * 10**9


def _opener(
    options: FleetOptions, wanted: Wanted, notify: Callable[[str], None]
) -> Callable[[], Any]:
    from fleet.ask.local import open_local
    from fleet.ask.store import Range, open_folder

    now = time.time_ns()
    range = Range(now - int(options.since * 1e9), now - int(options.until * 1e9))
    if options.store is not None:
        return partial(open_folder, Path(options.store), range)
    if not options.socket_given and _STORE.is_dir() and os.access(_STORE, os.R_OK):
        return partial(open_folder, _STORE, range)
    notify(f"no store at {_STORE}: this machine's own history answers (--store DIR)")
    is_joined = options.question in ("ends", "map")  # with flows that do not fit
    earlier = _earlier(options, range) if options.question == "new" else None
    return partial(open_local, options.socket, range, None if is_joined else wanted, earlier)
