# SPDX-License-Identifier: MIT
"""What a daemon sends about the ends of flows, before their records."""

from __future__ import annotations

import msgspec

from nlproto.records.ends import FlowKey, Translated
from nlproto.records.wire import address_text
from nlproto.tables.flows import pack_address

__all__ = ["ToldEnd"]


class ToldEnd(msgspec.Struct, frozen=True):
    """The name of a flow's far end, and what NAT made of both ends."""

    netns: int
    proto: int
    local: str
    lport: int
    remote: str
    rport: int
    pid: int
    start_ns: int
    domain: str
    nat: tuple[str, int, str, int] | None = None
    """Local address and port, remote address and port."""

    @classmethod
    def of(cls, key: FlowKey, domain: str, became: Translated | None = None) -> ToldEnd:
        """Return what to send about a flow."""
        tgid, start_ns, (netns, proto, family, near, lport, far, rport) = key
        local, remote = address_text(family, near), address_text(family, far)
        nat = None
        if became is not None:
            ends = address_text(family, became[0]), address_text(family, became[2])
            nat = ends[0], became[1], ends[1], became[3]
        return cls(netns, proto, local, lport, remote, rport, tgid, start_ns, domain, nat)

    @property
    def key(self) -> FlowKey:
        """Return the flow's key. Raises ValueError."""
        family, near = pack_address(self.local)
        _, far = pack_address(self.remote)
        way = (self.netns, self.proto, family, near, self.lport, far, self.rport)
        return self.pid, self.start_ns, way

    @property
    def became(self) -> Translated | None:
        """Return what NAT made of the ends. Raises ValueError."""
        if self.nat is None:
            return None
        local, lport, remote, rport = self.nat
        return pack_address(local)[1], lport, pack_address(remote)[1], rport
