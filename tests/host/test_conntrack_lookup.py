# SPDX-License-Identifier: MIT
"""Translations are asked for one by one, but only where the kernel follows connections (root)."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nlproto.host import netns
from nlproto.kernel.conntrack import ConntrackLookup, is_there
from translating import sh

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace (root)"),
    pytest.mark.skipif(not is_there(), reason="this kernel translates no addresses"),
]

NAME = f"ct{os.getpid()}"


@pytest.fixture
def inside() -> Iterator[Any]:
    """Runs a function in a new network namespace."""
    sh(f"ip netns add {NAME}")
    path = Path("/run/netns") / NAME
    number = path.stat().st_ino
    try:
        sh(f"ip -n {NAME} link set lo up")
        yield lambda call: netns.run_inside(path, number, call)
    finally:
        with suppress(Exception):
            sh(f"ip netns del {NAME}")


def test_where_no_connection_is_followed_one_question_is_enough(inside: Any) -> None:
    lookup = inside(lambda: ConntrackLookup(time.monotonic_ns, again=False))
    with lookup:
        asked = []
        exchange = lookup._asking.exchange

        def counted(kind: int, *others: Any) -> Any:
            asked.append(kind)
            return exchange(kind, *others)

        lookup._asking.exchange = counted
        here = socket.inet_aton("127.0.0.1").ljust(16, b"\0")

        def ends(port: int) -> Any:
            return lookup.ends(socket.IPPROTO_UDP, socket.AF_INET, (here, port), (here, 5999))

        assert [ends(port) for port in range(1, 6)] == [None] * 5
        assert len(asked) == 1
        sh(f"ip netns exec {NAME} nft -f -", RULES)
        inside(talk)
        assert ends(5300) is None  # that packet came later
        lookup.begin()
        near, far = ends(5300)
        assert (near[1], far[1]) == (5353, 5999)


RULES = """
table ip t { chain out { type nat hook output priority -100;
udp dport 5300 dnat to 127.0.0.1:5353; }
chain in { type nat hook postrouting priority 100; }; }
"""


def talk() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 5999))
        one.sendto(b"x", ("127.0.0.1", 5300))
