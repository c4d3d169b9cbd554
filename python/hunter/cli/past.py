# SPDX-License-Identifier: MIT
"""The words of commands that ask the history: usage and watch."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from hunter.cli.common import add_limit, add_moment
from hunter.cli.options import NEWS, USED_BY

__all__ = ["usage", "watch"]

New = Callable[[str, str, str], argparse.ArgumentParser]
"""(name, description, epilog) -> a parser."""


def usage(new: New) -> argparse.ArgumentParser:
    """Return the parser of `usage`."""
    parser = new(
        "usage",
        "Who used how much of the network: sums of all flows that had packets since a time.",
        "examples:\n  packet-hunter usage --since 30d\n"
        "  packet-hunter usage --by unit --since 2026-05-28 --json\n",
    )
    keys = f"sums by {', '.join(USED_BY)} (process)"
    parser.add_argument("--by", metavar="KEY", choices=USED_BY, default="process", help=keys)
    add_moment(
        parser, "--since", "so long ago (12h, 30d; 1d), or since 14:30, 2026-05-28 or both", 86400.0
    )
    add_limit(parser)
    return parser


def watch(new: New) -> argparse.ArgumentParser:
    """Return the parser of `watch`."""
    parser = new(
        "watch",
        "Report programs, destinations and listeners that were not seen before, by the daemon's"
        " history on disk knows. Exits 0 if there were any, 1 if not, 2 on failure.",
        "examples:\n  packet-hunter watch --once --since 1h\n"
        "  packet-hunter watch listener program --journal --webhook https://hooks.example.org/net\n",
    )
    parser.add_argument(
        "kinds",
        metavar="KIND",
        nargs="*",
        type=_kind,
        help=f"{', '.join(NEWS)}: what must be new (all of them)",
    )
    parser.add_argument("--once", action="store_true", help="report what is new since T, and exit")
    add_moment(
        parser, "--since", "begin so long ago (10m, 12h; with --once 1h, else now), or at 14:30"
    )
    add_moment(
        parser, "--unseen", "new means not seen for this time (1d or more; 30d)", 30 * 86400.0
    )
    parser.add_argument(
        "--journal",
        action="store_true",
        help="write lines to standard error with the journal's priority before them",
    )
    parser.add_argument("--webhook", metavar="URL", help="POST each as JSON to http(s)://...")
    parser.add_argument("--json", action="store_true", help="one JSON object on each line")
    return parser


def _kind(text: str) -> str:
    if text not in NEWS:
        raise argparse.ArgumentTypeError(f"'{text}' is none of {', '.join(NEWS)}")
    return text
