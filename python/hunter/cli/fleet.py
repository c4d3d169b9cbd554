# SPDX-License-Identifier: MIT
"""The command line of `packet-hunter fleet`."""

from __future__ import annotations

import argparse

from hunter.cli import values
from hunter.cli.common import add_limit, add_moment
from hunter.cli.options import FLEET_BY, FLEET_NEW, FLEET_QUESTIONS, FLEET_WORDS

__all__ = ["DESCRIPTION", "EXAMPLES", "add_arguments"]

DESCRIPTION = (
    "Ask about flows of many machines, which packet-hunter-collect has stored; without a store, ask"
    " the history of this machine's daemon. Exits 1 when nothing is found."
)
EXAMPLES = (
    "examples:\n  packet-hunter fleet who port 5432 --since 10m\n"
    "  packet-hunter fleet who 'exe /opt/* and not dst net 10 and how unnamed'\n"
    "  packet-hunter fleet ends --on web3 pname nginx --since 14:00 --until 14:10\n"
    "  packet-hunter fleet map --by unit --html map.html\n"
    "  packet-hunter fleet new --of listener --since 1d\n"
    "  packet-hunter fleet usage --by host --json\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words of a question."""
    about = ", ".join(f"{name}: {what}" for name, what in FLEET_QUESTIONS.items())
    parser.add_argument("question", metavar="QUESTION", choices=FLEET_QUESTIONS, help=about)
    parser.add_argument(
        "filter",
        metavar="FILTER",
        nargs="*",
        default=[],
        help="which flows: packet-hunter's filter words; a flow fits if one of its packets does",
    )
    parser.add_argument(
        "--store", metavar="DIR", help="a collector's folder (/var/lib/packet-hunter-collect)"
    )
    group = parser.add_argument_group("about")
    group.add_argument("--on", metavar="HOST", help="processes of this machine")
    group.add_argument("--host", metavar="H", help="address or network of the other end")
    group.add_argument("--user", metavar="USER", help="of this user's processes: name or uid")
    for word, (name, about) in FLEET_WORDS.items():
        kind = {"port": values.used_port, "pid": values.pid}.get(word, str)
        group.add_argument(f"--{word}", metavar=name, type=kind, help=about)
    group.add_argument("--proto", metavar="P", choices=("tcp", "udp"), help="tcp or udp")
    add_moment(
        group, "--since", "so long ago (10m, 1d; 1h), or since 14:30, 2026-05-28 or both", 3600.0
    )
    add_moment(group, "--until", "up to then (now)", 0.0)
    how = parser.add_argument_group("how")
    how.add_argument(
        "--by", metavar="KEY", choices=FLEET_BY, help=f"usage, map: by {', '.join(FLEET_BY)}"
    )
    how.add_argument(
        "--of",
        metavar="WHAT",
        choices=FLEET_NEW,
        default="destination",
        help=f"new: {', '.join(FLEET_NEW)} (destination)",
    )
    how.add_argument(
        "--days",
        metavar="N",
        type=values.count,
        default=30,
        help="new: not seen in so many days before (30)",
    )
    how.add_argument("--html", metavar="FILE", help="map: write a page; - is standard output")
    add_limit(how)
