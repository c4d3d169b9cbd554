# SPDX-License-Identifier: MIT
"""Options that several subcommands have."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from hunter.cli import values

__all__ = ["add_ends", "add_limit", "add_moment", "add_words"]


def add_words(
    group: argparse._ActionsContainer,
    words: Iterable[tuple[str, str, str]],
    repeatable: bool = False,
) -> None:
    """Add options that take a text: (option, metavar, help) each."""
    for option, metavar, help in words:
        action = "append" if repeatable else "store"
        group.add_argument(option, metavar=metavar, action=action, help=help)


def add_ends(group: argparse._ActionsContainer) -> None:
    """Add the options for an end of a flow, beside its port."""
    group.add_argument("--proto", metavar="P", choices=("tcp", "udp"), help="tcp or udp")
    group.add_argument("--host", metavar="H", help="address or network of the other end")


def add_moment(
    group: argparse._ActionsContainer, option: str, help: str, default: float | None = None
) -> None:
    """Add --since or --until: seconds before now."""
    group.add_argument(option, metavar="T", type=values.moment, default=default, help=help)


def add_limit(
    group: argparse._ActionsContainer, help: str = "at most N rows (50; with --json 1000)"
) -> None:
    """Add --limit."""
    group.add_argument("--limit", metavar="N", type=values.count, help=help)
