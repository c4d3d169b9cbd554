# SPDX-License-Identifier: MIT
"""What the engine left open is named by sock_diag, by the packet's own socket only."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nlproto.host import netns
from nlproto.pipeline.naming import Namer
from nlproto.records import wire

LOCAL = socket.inet_aton("127.0.0.1").ljust(16, b"\0")


def arrived(proto: Any, port: int, cookie: int) -> Any:
    """A record of a packet to `port`, open to be named."""
    record = np.zeros(1, wire.RECORD)
    record["family"], record["proto"], record["netns"] = socket.AF_INET, proto, netns.own()
    record["time_ns"] = time.monotonic_ns()
    record["dir"], record["how"] = wire.lib.SNIFFER_DIR_IN, wire.lib.SNIFFER_HOW_NOT_PROBED
    record["sport"], record["dport"], record["cookie"] = 40001, port, cookie
    record["saddr"] = record["daddr"] = np.frombuffer(LOCAL, np.uint8)
    return record


def cookie_of(sock: socket.socket) -> Any:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), "little")  # SO_COOKIE


def named(record: Any) -> int:
    with Namer() as namer:
        namer.name(record)
    return int(record["tgid"][0])


@pytest.fixture
def bound() -> Iterator[Any]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock


@pytest.fixture
def listener() -> Iterator[Any]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock


def test_a_socket_with_the_packets_cookie_is_its_own(bound: Any) -> None:
    record = arrived(socket.IPPROTO_UDP, bound.getsockname()[1], cookie_of(bound))
    assert named(record) == os.getpid()


def test_who_has_the_port_since_is_not_named(bound: Any) -> None:
    record = arrived(socket.IPPROTO_UDP, bound.getsockname()[1], cookie_of(bound) + 1)
    assert named(record) == 0


@pytest.mark.parametrize("cookie", [0, 1 << 60])
def test_a_listener_is_not_named_for_a_connection_that_is_gone(listener: Any, cookie: int) -> None:
    record = arrived(socket.IPPROTO_TCP, listener.getsockname()[1], cookie)
    assert named(record) == 0


def test_a_listener_is_named_for_what_is_its_own(listener: Any) -> None:
    record = arrived(socket.IPPROTO_TCP, listener.getsockname()[1], cookie_of(listener))
    assert named(record) == os.getpid()
