# SPDX-License-Identifier: MIT
"""Raw and ping sockets."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import numpy as np

from ..catalog import scenario
from ..recorder import Recorder
from ..stage import Stage, Wire, sysctl
from ..traffic import (
    UDP,
    V4,
    bound,
    playing,
)
from ..truth import Worker


def nothing_recorded(records: np.ndarray, recorder: Recorder, directory: Path) -> list[str]:
    return [f"{len(records)} records of packets without ports"] if len(records) else []


def echo_request(sequence: int) -> bytes:
    head = struct.pack("!BBHHH", 8, 0, 0, 4711, sequence)
    total = sum(struct.unpack("!4H", head))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!BBHHH", 8, 0, ~total & 0xFFFF, 4711, sequence)


def pinger(worker: Worker, wire: Wire, kind: int) -> None:
    sock = socket.socket(V4, kind, socket.IPPROTO_ICMP)
    sock.settimeout(30)
    for sequence in range(5):
        sock.sendto(echo_request(sequence), ("127.0.0.1", 0))
        sock.recv(100)


@scenario(check=nothing_recorded)
def icmp_ping_socket(stage: Stage) -> None:
    """Ping sockets are out of scope: nothing is recorded."""
    sysctl("net.ipv4.ping_group_range", "0 2147483647")
    with playing(stage):
        stage.spawn("pinger", pinger, UDP)


@scenario(check=nothing_recorded)
def icmp_raw_socket(stage: Stage) -> None:
    """Raw ICMP is out of scope: nothing is recorded."""
    with playing(stage):
        stage.spawn("pinger", pinger, socket.SOCK_RAW)


def raw_udp(worker: Worker, wire: Wire, port: int, target: int) -> None:
    sock = socket.socket(V4, socket.SOCK_RAW, socket.IPPROTO_UDP)
    worker.claim_port(port, out=5, exact=True)
    for _ in range(5):
        sock.sendto(struct.pack("!HHHH", port, target, 12, 0) + b"raw!", ("127.0.0.1", 0))


@scenario()
def raw_socket_sends_udp(stage: Stage) -> None:
    """A raw socket sends UDP by hand: the sender is named, and a receiver as ever."""
    with playing(stage):
        sock = bound(V4, UDP)
        stage.worker.claim(sock, exact=True, in_=5)
        child = stage.spawn("handmade", raw_udp, 4711, sock.getsockname()[1])
        child.join()
