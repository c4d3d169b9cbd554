# SPDX-License-Identifier: MIT
"""Names on the server: stream, subjects, consumers."""

from __future__ import annotations

__all__ = ["CONSUMER", "STREAM", "SUBJECTS", "inbox_of"]

STREAM = "PACKET_HUNTER"
CONSUMER = "collect"
SUBJECTS = ("flows.>", "procs.>", "account.>")
"""The host's name follows."""


def inbox_of(name: str) -> str:
    """Return the beginning of the subjects on which `name` gets answers."""
    return f"_INBOX_{name.replace('.', '_')}"
