# SPDX-License-Identifier: MIT
"""Why the kernel dropped packets, on each kernel: by the socket that sent them."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator

import pytest

from nlproto.host import netns
from nlproto.host.sockdiag import SockDiag
from nlproto.kernel.bpf import NoBpf
from nlproto.kernel.drop_reasons import DropReasons
from waiting import until

TABLE = "table inet wall { chain out { type filter hook output priority 0; udp dport 9 drop; }; }"


@pytest.fixture(name="reasons")
def _reasons() -> Iterator[DropReasons]:
    try:
        with DropReasons() as reasons:
            yield reasons
    except NoBpf as error:
        pytest.skip(str(error))


def dropped_at(reasons: DropReasons, one: socket.socket) -> dict[str, int]:
    cookie = int.from_bytes(one.getsockopt(socket.SOL_SOCKET, 57, 8), "little")  # SO_COOKIE
    with SockDiag() as diag:
        return reasons.read({netns.own(): diag.dump()}).get(cookie, {})


def test_packets_that_a_firewall_drops_are_counted_for_their_socket(reasons: DropReasons) -> None:
    subprocess.run(["nft", "-f", "-"], input=TABLE, text=True, check=True)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            for _ in range(20):
                with pytest.raises(PermissionError):
                    one.sendto(b"x", ("127.0.0.1", 9))
            until(lambda: dropped_at(reasons, one) == {"NETFILTER_DROP": 20}, 10)
    finally:
        subprocess.run(["nft", "delete", "table", "inet", "wall"], check=True)


def test_packets_without_room_are_counted_for_who_does_not_read_or_for_nobody(
    reasons: DropReasons,
) -> None:
    before = reasons.ownerless().get("SOCKET_RCVBUFF", 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as full:
        full.bind(("127.0.0.1", 0))
        full.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        for _ in range(100):
            full.sendto(b"x" * 500, full.getsockname())
        with SockDiag() as diag:
            table = diag.dump()
        drops = int(table["drops"][table["sport"] == full.getsockname()[1]][0])
        assert drops > 50
        if reasons.tells_receivers:
            assert dropped_at(reasons, full) == {"SOCKET_RCVBUFF": drops}
        else:
            assert reasons.ownerless()["SOCKET_RCVBUFF"] - before == drops
