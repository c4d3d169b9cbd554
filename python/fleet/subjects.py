# SPDX-License-Identifier: MIT
"""What is called how on the server."""

from __future__ import annotations

__all__ = ["CONSUMER", "STREAM", "SUBJECTS", "inbox_of"]

STREAM = "PACKET_HUNTER"
CONSUMER = "collect"
SUBJECTS = ("flows.>", "procs.>", "account.>")
"""What follows is the host's name."""


def inbox_of(name: str) -> str:
    """Return the beginning of the subjects on which `name` gets answers."""
    return f"_INBOX_{name.replace('.', '_')}"
