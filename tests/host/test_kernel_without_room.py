# SPDX-License-Identifier: MIT
"""The kernel has no room for an answer at a moment: it is asked again, nothing is given up (root).

Here the socket's receive buffer is full of answers that nobody read. A lack of memory is the same.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nlproto.engines.packet_names import PacketNames
from nlproto.errors import Error, NoPrivilege
from nlproto.host import netns
from nlproto.host.holders import Holders
from nlproto.host.namespace_sockets import NamespaceSockets
from nlproto.host.sockdiag import SockDiag
from nlproto.host.socket_lookup import SocketLookup, Tuple
from nlproto.records import wire

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="who holds a socket needs root")

LOCAL = socket.inet_aton("127.0.0.1").ljust(16, b"\0")


def fill(diag: SockDiag) -> None:
    """Leave no room for the next answer."""
    diag._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    for _ in range(64):
        diag._send(socket.AF_INET, socket.IPPROTO_UDP, False)


@pytest.fixture
def diag() -> Iterator[SockDiag]:
    with SockDiag() as made:
        yield made


@pytest.fixture
def bound() -> Iterator[Tuple]:
    """The flow of a UDP socket of ours."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        yield Tuple(socket.IPPROTO_UDP, socket.AF_INET, LOCAL, sock.getsockname()[1], LOCAL, 9)


def test_it_is_no_refusal(diag: SockDiag, bound: Tuple) -> None:
    fill(diag)
    with pytest.raises(Error, match="no answer now") as caught:
        diag.find(bound.proto, bound.family, bound.local, bound.lport)
    assert not isinstance(caught.value, NoPrivilege)
    assert diag.find(bound.proto, bound.family, bound.local, bound.lport) is not None


def test_lookups_go_on_with_sock_diag(diag: SockDiag, bound: Tuple) -> None:
    sockets = SocketLookup(diag, time.monotonic_ns)
    fill(diag)
    with pytest.raises(Error):
        sockets.find(bound)
    assert sockets.by_diag
    found = sockets.find(bound)
    assert found is not None
    assert int(found["cookie"]) != 0, "/proc/net was read"


def test_a_packet_is_named_all_the_same(diag: SockDiag, bound: Tuple) -> None:
    """Its flow is asked about alone, if the answers for all had no room."""
    names = PacketNames(diag, Holders(), lambda *_: True, time.monotonic_ns)
    fill(diag)
    assert wire.how_name(int(name_one(names, bound)["how"])) == "diag"


def test_the_next_packet_of_a_flow_is_named(
    diag: SockDiag, bound: Tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = PacketNames(diag, Holders(), lambda *_: True, time.monotonic_ns)
    find_many = diag.find_many

    def full(*ends: Any) -> Any:
        fill(diag)
        found = find_many(*ends)
        fill(diag)
        return found

    monkeypatch.setattr(diag, "find_many", full)
    assert wire.how_name(int(name_one(names, bound)["how"])) == "not_probed"
    monkeypatch.undo()
    assert wire.how_name(int(name_one(names, bound)["how"])) == "diag"


def name_one(names: PacketNames, one: Tuple) -> Any:
    record = np.zeros(1, wire.RECORD)
    record["family"], record["proto"], record["netns"] = one.family, one.proto, netns.own()
    record["time_ns"], record["dir"] = time.monotonic_ns(), wire.lib.SNIFFER_DIR_OUT
    record["saddr"] = record["daddr"] = np.frombuffer(LOCAL, np.uint8)
    record["sport"], record["dport"] = one.lport, one.rport
    return names.name(record, np.zeros(1, bool))[0]


def test_what_was_read_of_a_namespace_stays(bound: Tuple) -> None:
    def there() -> bool:
        return bound.lport in sockets.tables()[netns.own()]["sport"]

    with NamespaceSockets() as sockets:
        assert there()
        own = sockets.there()[netns.own()]
        fill(own)
        assert there()
        assert sockets.there()[netns.own()] is own
        assert there()


def test_a_namespace_that_cannot_be_entered_now_is_no_lack_of_rights() -> None:
    other = Path("/proc/self/ns/uts")
    with pytest.raises(OSError, match="Invalid argument"):
        netns.run_inside(other, other.stat().st_ino, lambda: None)
