# SPDX-License-Identifier: MIT
"""A row of the port map, for people."""

from __future__ import annotations

from typing import NamedTuple

from nlproto.host.kernel_sockets import Endpoint
from nlproto.records.wire import address_text
from nlproto.tables.processes import ProcessKey

__all__ = ["PortOwner"]


class PortOwner(NamedTuple):
    """One process at one local end."""

    endpoint: Endpoint
    tgid: int
    start_ns: int
    uid: int
    comm: str
    cookie: int
    listening: bool
    """Whether the kernel's tables have it as a listener or an unconnected UDP socket."""
    seen_ns: int
    """CLOCK_MONOTONIC when a packet or the kernel's tables last showed it."""

    @property
    def key(self) -> ProcessKey:
        """(tgid, start_ns) of the process."""
        return self.tgid, self.start_ns

    @property
    def netns(self) -> int:
        """Inode of the network namespace."""
        return self.endpoint[0]

    @property
    def proto(self) -> int:
        """IPPROTO_TCP or IPPROTO_UDP."""
        return self.endpoint[1]

    @property
    def address(self) -> str:
        """Address of the local end, as text."""
        return address_text(self.endpoint[2], self.endpoint[3])

    @property
    def port(self) -> int:
        """Port of the local end."""
        return self.endpoint[4]
