# SPDX-License-Identifier: MIT
"""How a TCP connection began and ended, from the flags of its packets."""

from __future__ import annotations

__all__ = ["ACK", "RST", "SYN", "outcome"]

SYN, RST, ACK = 2, 4, 16


def outcome(tcp_in: int, tcp_out: int) -> str | None:
    """Return the outcome, from all TCP flags in both directions; None: nothing is wrong.

    "refused": the answer to our SYN was a reset. "unanswered": no answer came, up to now. "reset":
    the far end broke the connection off. "aborted": this end did, or refused it.
    """
    if tcp_out & SYN and not tcp_out & ACK and not tcp_in & SYN:
        return "refused" if tcp_in & RST else None if tcp_in else "unanswered"
    if tcp_in & RST:
        return "reset"
    return "aborted" if tcp_out & RST else None
