# SPDX-License-Identifier: MIT
"""sock_diag against sockets of this very process; /proc/net must agree with it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nlproto.host import procfs
from nlproto.host.sockdiag import SockDiag, TcpState
from nlproto.host.socket_lookup import SocketLookup, Tuple
from waiting import there

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
families = pytest.mark.parametrize("family", LOOPBACK, ids=["v4", "v6"])


@pytest.fixture
def diag() -> Iterator[SockDiag]:
    with SockDiag() as found:
        yield found


def octets(family: Any, address: Any) -> Any:
    return socket.inet_pton(family, address).ljust(16, b"\0")


def inode(sock: socket.socket) -> Any:
    return os.fstat(sock.fileno()).st_ino


def cookie(sock: socket.socket) -> Any:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), "little")


@pytest.fixture
def made() -> Iterator[Any]:
    sockets = []

    def make(family: Any, kind: Any, address: Any = None) -> Any:
        sock = socket.socket(family, kind)
        sockets.append(sock)
        sock.bind((LOOPBACK[family] if address is None else address, 0))
        return sock

    yield make
    for sock in sockets:
        sock.close()


def connected(made: Any, family: int) -> tuple[socket.socket, socket.socket]:
    """A listener, and a client whose connection it has not accepted."""
    listener = made(family, socket.SOCK_STREAM)
    listener.listen()
    client = made(family, socket.SOCK_STREAM)
    client.connect(listener.getsockname())
    return listener, client


@families
def test_both_ends_and_the_listener_of_a_connection_are_found(
    diag: SockDiag, made: Any, family: Any
) -> None:
    here = octets(family, LOOPBACK[family])
    listener, client = connected(made, family)
    server, _ = listener.accept()
    with server:
        sport, cport = listener.getsockname()[1], client.getsockname()[1]
        found = diag.find(TCP, family, here, cport, here, sport)
        assert (int(there(found)["inode"]), int(there(found)["cookie"])) == (
            inode(client),
            cookie(client),
        )
        assert int(there(found)["state"]) == TcpState.ESTABLISHED
        found = diag.find(TCP, family, here, sport, here, cport)
        assert int(there(found)["inode"]) == inode(server)
        found = diag.find(TCP, family, here, sport)
        assert (int(there(found)["inode"]), int(there(found)["state"])) == (
            inode(listener),
            TcpState.LISTEN,
        )


@families
def test_a_connection_that_nobody_accepted_has_no_inode(
    diag: SockDiag, made: Any, family: Any
) -> None:
    here = octets(family, LOOPBACK[family])
    listener, client = connected(made, family)
    found = diag.find(TCP, family, here, listener.getsockname()[1], here, client.getsockname()[1])
    assert int(there(found)["inode"]) == 0


@families
@pytest.mark.parametrize("wildcard", [False, True])
def test_a_bound_udp_socket_is_found_by_a_packet_that_it_would_get(
    diag: SockDiag, made: Any, family: Any, wildcard: bool
) -> None:
    here = octets(family, LOOPBACK[family])
    address = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}[family] if wildcard else None
    sock = made(family, socket.SOCK_DGRAM, address)
    found = diag.find(UDP, family, here, sock.getsockname()[1], here, 9)
    assert (int(there(found)["inode"]), int(there(found)["cookie"])) == (inode(sock), cookie(sock))


def test_of_two_connected_udp_sockets_the_right_one_is_found(diag: SockDiag, made: Any) -> None:
    here = octets(socket.AF_INET, "127.0.0.1")
    socks: list[Any] = []
    for _ in range(2):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", socks[0].getsockname()[1] if socks else 0))
        sock.connect(("127.0.0.1", 20001 + len(socks)))
        socks.append(sock)
    port = socks[0].getsockname()[1]
    for sock, remote in zip(socks, (20001, 20002), strict=True):
        found = diag.find(UDP, socket.AF_INET, here, port, here, remote)
        assert int(there(found)["inode"]) == inode(sock)
        sock.close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_dual_stack_socket_is_found_by_an_ipv4_packet(
    diag: SockDiag, made: Any, kind: Any
) -> None:
    sock = made(socket.AF_INET6, kind, "::")
    if kind == socket.SOCK_STREAM:
        sock.listen()
    proto = TCP if kind == socket.SOCK_STREAM else UDP
    here = octets(socket.AF_INET, "127.0.0.1")
    found = diag.find(proto, socket.AF_INET, here, sock.getsockname()[1], here, 9)
    assert int(there(found)["inode"]) == inode(sock)


@pytest.mark.parametrize("proto", [TCP, UDP])
def test_nobody_is_none(diag: SockDiag, proto: Any) -> None:
    here = octets(socket.AF_INET, "127.0.0.1")
    assert diag.find(proto, socket.AF_INET, here, 1, here, 1) is None


def test_a_dump_and_proc_net_list_the_same_sockets(diag: SockDiag, made: Any) -> None:
    mine = {
        inode(made(family, kind)): kind
        for family in LOOPBACK
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM)
        for _ in range(3)
    }
    mine = {number: kind for number, kind in mine.items() if kind == socket.SOCK_DGRAM}
    names = ["inode", "family", "proto", "sport", "uid", "saddr"]

    def rows(sockets: Any) -> list[Any]:
        chosen = sockets[np.isin(sockets["inode"], list(mine))]
        return sorted(str([row[name].tolist() for name in names]) for row in chosen)

    assert len(rows(diag.dump())) == 6
    assert rows(diag.dump()) == rows(procfs.tables())


def test_a_dump_can_be_narrowed_to_a_port(diag: SockDiag, made: Any) -> None:
    sock = made(socket.AF_INET, socket.SOCK_DGRAM)
    made(socket.AF_INET, socket.SOCK_DGRAM)
    found = diag.dump((UDP,), lport=sock.getsockname()[1])
    assert found["inode"].tolist() == [inode(sock)]


def test_a_thousand_sockets_fit_a_dump(diag: SockDiag, made: Any) -> None:
    mine = {inode(made(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(900)}
    assert mine <= set(diag.dump((UDP,))["inode"].tolist())


def test_packets_without_room_are_counted_as_the_kernel_does(diag: SockDiag) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as full:
        full.bind(("127.0.0.1", 0))
        full.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        for _ in range(50):
            full.sendto(b"x" * 500, full.getsockname())
        (row,) = [one for one in diag.dump((UDP,)) if one["inode"] == inode(full)]
        (line,) = [one for one in open("/proc/net/udp") if one.split()[9] == str(inode(full))]
        assert 0 < row["drops"] == int(line.split()[12])
        (read,) = [one for one in procfs.tables() if one["inode"] == inode(full)]
        assert read["drops"] == row["drops"]


@families
def test_many_are_found_with_one_call_as_each_alone(diag: SockDiag, made: Any, family: Any) -> None:
    here = octets(family, LOOPBACK[family])
    sockets = [made(family, socket.SOCK_DGRAM) for _ in range(50)]
    ends = [(UDP, family, here, one.getsockname()[1], here, 9) for one in sockets]
    ends[10:10] = [(TCP, family, here, 1, here, 9)]  # nobody's
    found = diag.find_many(ends)
    assert [None if row is None else int(row["inode"]) for row in found] == [
        *(inode(one) for one in sockets[:10]),
        None,
        *(inode(one) for one in sockets[10:]),
    ]
    assert [row if row is None else row.tobytes() for row in found] == [
        row if (row := diag.find(*one)) is None else row.tobytes() for one in ends
    ]
    assert diag.find_many([]) == []


def test_what_comes_after_a_request_that_fails_is_not_answered(diag: SockDiag, made: Any) -> None:
    here, port = (
        octets(socket.AF_INET, "127.0.0.1"),
        made(socket.AF_INET, socket.SOCK_DGRAM).getsockname()[1],
    )
    good, bad = (UDP, socket.AF_INET, here, port, here, 9), (UDP, 99, here, port, here, 9)
    assert [row is not None for row in diag.find_many([good, good, bad, good])] == [True, True]
    assert diag.find(*good) is not None


def test_packets_that_wait_are_asked_about_together(
    diag: SockDiag, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not again: each answer is of that moment."""
    lookup = SocketLookup(diag, time.monotonic_ns)
    here = octets(socket.AF_INET, "127.0.0.1")
    ports = [made(socket.AF_INET, socket.SOCK_DGRAM).getsockname()[1] for _ in range(3)]
    several = [Tuple(UDP, socket.AF_INET, here, port, here, 9) for port in ports]
    lookup.ask_together(several)
    alone, find = [], diag.find

    def counted(*one: Any) -> Any:
        alone.append(one)
        return find(*one)

    monkeypatch.setattr(diag, "find", counted)
    assert [there(lookup.find(one))["sport"] for one in several] == ports
    assert not alone
    assert there(lookup.find(several[0]))["sport"] == ports[0] and len(alone) == 1
