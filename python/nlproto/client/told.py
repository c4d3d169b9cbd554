# SPDX-License-Identifier: MIT
"""Names of far ends as a daemon tells them, before the records that they are of."""

from __future__ import annotations

import msgspec

from nlproto.records.ends import FlowKey
from nlproto.records.wire import address_text
from nlproto.tables.flows import pack_address

__all__ = ["ToldEnd"]


class ToldEnd(msgspec.Struct, frozen=True):
    """The name of one flow's far end."""

    netns: int
    proto: int
    local: str
    lport: int
    remote: str
    rport: int
    pid: int
    start_ns: int
    domain: str

    @classmethod
    def of(cls, key: FlowKey, domain: str) -> ToldEnd:
        """Return what is told of a flow."""
        tgid, start_ns, (netns, proto, family, near, lport, far, rport) = key
        local, remote = address_text(family, near), address_text(family, far)
        return cls(netns, proto, local, lport, remote, rport, tgid, start_ns, domain)

    @property
    def key(self) -> FlowKey:
        """Of the flow. Raises ValueError."""
        family, near = pack_address(self.local)
        _, far = pack_address(self.remote)
        way = (self.netns, self.proto, family, near, self.lport, far, self.rport)
        return self.pid, self.start_ns, way
