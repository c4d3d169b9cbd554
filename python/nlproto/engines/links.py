# SPDX-License-Identifier: MIT
"""Netfilter links, by which engine ebpf sees outgoing packets: one set for each network namespace.

The kernel may skip programs on functions (bpf/out.h), but never a link's. A new namespace gets its
links after some 0.3 s. Until then the functions report its packets.
"""

from __future__ import annotations

import os
import struct
import time
from contextlib import suppress
from pathlib import Path

from nlproto.engines.namespaces import CapturedNamespaces
from nlproto.host import netns, procfs
from nlproto.kernel.bpf import Object, link_netfilter

__all__ = ["PROGRAM", "NetfilterLinks", "open_links"]

PROGRAM = "link_out"
"""Name of the program in bpf/out.h that the links call."""
_MAP = "links"
_PLACES = [(family, hook) for family in (2, 10) for hook in (2, 3)]  # FORWARD, LOCAL_OUT
_BEGINS, _TELLS = struct.pack("=I", 1), struct.pack("=I", 2)  # as in bpf/out.h
_PATIENCE = 3.0  # s that a start waits: without a link a packet may be missed
_ON_THEIR_WAY = 0.05  # s, for packets that are between Netfilter and the functions


class _Links:
    """The links of one namespace, that of the calling thread. Raises OSError."""

    def __init__(self, loaded: Object, inode: int) -> None:
        self._loaded = loaded
        self._key = struct.pack("=I", inode)
        self._fds: list[int] = []
        try:
            for family, hook in _PLACES:
                program = loaded.programs[PROGRAM].fd
                self._fds.append(link_netfilter(program, family, hook))
            loaded.update(_MAP, self._key, _BEGINS)
            time.sleep(_ON_THEIR_WAY)
            loaded.update(_MAP, self._key, _TELLS)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Let the functions report again."""
        with suppress(OSError):
            self._loaded.delete(_MAP, self._key)
        while self._fds:
            os.close(self._fds.pop())


class NetfilterLinks:
    """Links in our own namespace and in all others, also new ones. close() ends them."""

    def __init__(self, loaded: Object, own: int, finder: netns.Finder | None = None) -> None:
        self._loaded = loaded
        self._own = _Links(loaded, own)
        self._others: dict[int, _Links] = {}
        # without links the functions report; nobody needs to know
        self._namespaces = CapturedNamespaces(self._make, own, lambda _: None, finder=finder)
        self._namespaces.start(_PATIENCE)

    def _make(self, inode: int, path: Path, ours: bool) -> _Links:
        return netns.run_inside(path, inode, lambda: _Links(self._loaded, inode))

    def look(self) -> None:
        """Close the links of namespaces that nobody uses any more. Call it now and then."""
        for inode, links in self._namespaces.changes():
            gone = self._others.pop(inode, None)
            if gone is not None:
                self._namespaces.give_back(gone)
            if links is not None:
                self._others[inode] = links

    def __len__(self) -> int:
        """Return how many namespaces have them."""
        return 1 + len(self._others)

    def close(self) -> None:
        """End all of them."""
        self._namespaces.close(self._others.values())
        self._own.close()


def open_links(loaded: Object, finder: netns.Finder | None = None) -> NetfilterLinks | None:
    """Return links; None if this kernel has none (before 6.4) or refuses them."""
    program = loaded.programs.get(PROGRAM)
    if program is None or program.fd < 0:
        return None
    try:
        return NetfilterLinks(loaded, netns.own(procfs.PROC), finder)
    except OSError:
        return None
