# SPDX-License-Identifier: MIT
"""hunter usage: who used how much of the network, by the daemon's history."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.text import Text

from hunter.cli.options import UsageOptions
from hunter.show import names
from hunter.show.console import Output, TextRow, put
from hunter.show.programs import place
from hunter.show.text import plain
from hunter.show.units import amount
from nlproto.client.client import DaemonClient

__all__ = ["run", "show"]

_ROWS = 50
_NUMBERS = ("flows", "packets", "received", "sent", "bytes")


def run(options: UsageOptions) -> None:
    """Ask and print. Raises Error."""
    limit = options.limit or (1000 if options.json else _ROWS)
    with DaemonClient(options.socket) as client:
        answer = client.usage(by=options.by, since=options.since, limit=limit)
    if options.json:
        print(json.dumps(answer))
    else:
        show(answer, time.time() - options.since, Output(soft_wrap=True))


def show(answer: Mapping[str, Any], since: float, console: Console) -> None:
    """Print the reply of op "usage"; `since`: Unix time that was asked for."""
    begin = datetime.fromtimestamp(max(since, answer["since"]))
    rows: list[TextRow] = []
    for one in answer["usage"]:
        name = _name(one, answer["by"])
        received, sent = one["bytes_in"], one["bytes_out"]
        packets = one["packets_in"] + one["packets_out"]
        sizes = (amount(size, "bin-bytes") for size in (received, sent, received + sent))
        text = Text(plain(name) or "-", style="bold green" if name else "yellow")
        rows.append([text, f"{one['flows']:,}", f"{packets:,}", *sizes])
    if not rows:
        console.print(f"nothing since {begin:%Y-%m-%d %H:%M}")
        return
    title = f"by {answer['by']}, flows with packets since {begin:%Y-%m-%d %H:%M}"
    put(console, title, (answer["by"], *_NUMBERS), rows, _NUMBERS)
    if answer["since"] > since:
        console.print("the history reaches back no further", style="dim")
    if answer["total"] > len(rows):
        more = answer["total"] - len(rows)
        console.print(f"{more:,} more: --limit {answer['total']}", style="dim")


def _name(one: Mapping[str, Any], by: str) -> str:
    if by == "user" and one["name"]:
        return names.user(int(one["name"]))
    if by == "container":
        return place(one["name"], one["container_name"], one["pod"], "")
    return str(one["name"])
