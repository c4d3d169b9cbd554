# SPDX-License-Identifier: MIT
"""Ways into the stack that are no plain system call, segments, loss, pids and age."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import threading
import time
from pathlib import Path

import numpy as np

from ..catalog import scenario
from ..recorder import Recorder
from ..stage import LIBC, Netns, Stage, Unable, Wire
from ..traffic import (
    TCP,
    UDP,
    V4,
    ask,
    bound,
    listening,
    playing,
    receive_all,
    send_back,
    udp_echo,
    udp_sender,
)
from ..truth import Worker
from .owners import quiet
from .tcp import accept_late

COUNT = 20
SO_BUSY_POLL, UDP_SEGMENT = 46, 103
SIOCETHTOOL, ETHTOOL_STSO, ETHTOOL_SGRO = 0x8946, 0x1F, 0x2C
ETHERNET_HEADER = 14


def uring(stage: Stage, way: str) -> None:
    with playing(stage):
        host, port = ask(stage.spawn("echo", udp_echo, V4, COUNT))
        child = stage.command("uring", "uring", way, port, COUNT)
        if number := child.hear():
            raise Unable(f"io_uring_setup: {os.strerror(number)}")


@scenario()
def io_uring_inline(stage: Stage) -> None:
    """io_uring, operations done inside the system call."""
    uring(stage, "inline")


@scenario()
def io_uring_async(stage: Stage) -> None:
    """io_uring, operations done by io-wq workers."""
    uring(stage, "async")


@scenario()
def io_uring_sqpoll(stage: Stage) -> None:
    """io_uring, operations submitted by the kernel's polling thread."""
    uring(stage, "sqpoll")


@scenario()
def io_uring_fixed_file(stage: Stage) -> None:
    """A socket without a descriptor: a child uses it through the ring that it has inherited."""
    uring(stage, "fixed")


def set_feature(interface: str, command: int, value: int) -> None:
    """ethtool -K by ioctl, in the caller's network namespace (linux/ethtool.h)."""
    option = ctypes.create_string_buffer(struct.pack("=II", command, value), 8)
    request = struct.pack("@16sP16x", interface.encode(), ctypes.addressof(option))
    with socket.socket(V4, UDP) as control:
        fcntl.ioctl(control, SIOCETHTOOL, request)


def in_namespace(stage: Stage, netns: Netns, interface: str, command: int, value: int) -> None:
    """set_feature() in another namespace."""

    def work(worker: Worker, wire: Wire) -> None:
        set_feature(interface, command, value)

    if stage.spawn("ethtool", work, netns=netns).join():
        raise Unable(f"{interface}: feature {command:#x} cannot be set")


def busy_echo(worker: Worker, wire: Wire, host: str) -> None:
    sock = bound(V4, UDP, host)
    sock.setsockopt(socket.SOL_SOCKET, SO_BUSY_POLL, 2000)
    claim = worker.claim(sock, exact=True)
    wire.tell(sock.getsockname())
    send_back(worker, claim, sock, COUNT)


@scenario()
def busy_polling(stage: Stage) -> None:
    """Two busy-polling receivers on one queue run each other's packets: each keeps its own."""
    other = stage.beside()
    set_feature("ve0", ETHTOOL_SGRO, 1)
    with playing(stage):
        for _ in range(2):
            peer = ask(stage.spawn("busy", busy_echo, "10.9.0.1"))
            child = stage.spawn("sender", udp_sender, peer, V4, COUNT, True, netns=other)
            child.tell()


def interface_counters(interface: str) -> dict[str, int]:
    text = next(
        row.split(":", 1)[1].split()
        for row in Path("/proc/thread-self/net/dev").read_text().splitlines()
        if row.strip().startswith(f"{interface}:")
    )
    return {
        "rx_bytes": int(text[0]), "rx_packets": int(text[1]),
        "tx_bytes": int(text[8]), "tx_packets": int(text[9]), "tx_dropped": int(text[11]),
    }  # fmt: skip


def wire_totals(records: np.ndarray, direction: int) -> tuple[int, int]:
    """Packets that the records stand for, and their bytes from the IP header on."""
    chosen = records[records["dir"] == direction]
    segments = chosen["gso_segs"].astype(np.int64)
    size = chosen["len"].astype(np.int64) + (segments - 1) * chosen["hdr_len"]
    return int(segments.sum()), int(size.sum())


def within_one_percent(records: np.ndarray, recorder: Recorder, directory: Path) -> list[str]:
    truth = json.loads((directory / "counters").read_text())
    here = records[records["netns"] == truth.pop("netns")]
    lines = []
    if truth["tx_dropped"]:
        lines.append(f"the interface dropped {truth['tx_dropped']} packets: they have records")
    for kind, direction in (("tx", 2), ("rx", 1)):
        packets, size = wire_totals(here, direction)
        for what, got in (("packets", packets), ("bytes", size)):
            wanted = truth[f"{kind}_{what}"]
            # a veth with GRO counts no Ethernet headers, others do
            ways = (got, got + packets * ETHERNET_HEADER * (what == "bytes"))
            if all(abs(way - wanted) > 0.01 * wanted for way in ways):
                lines.append(f"{kind} {what}: records say {got}, the interface {wanted}")
    if not (here["gso_segs"] > 1).any():
        lines.append("no record stands for several segments: nothing was tested")
    return lines


# A veth whose receiver is late keeps 256 packets; those it drops are sent, but not in tx_packets.
FEW_SEGMENTS = 65536


def sink(worker: Worker, wire: Wire, size: int) -> None:
    sock = listening(V4, "10.9.0.2")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, FEW_SEGMENTS)
    claim = worker.claim(sock, any_address=True, in_=10, out=5)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    worker.also(claim, peer)
    if len(receive_all(peer, size)) != size:
        raise RuntimeError("data lost")
    peer.sendall(bytes(size))
    receive_all(peer, 1)


def source(worker: Worker, wire: Wire, peer: tuple[str, int], size: int) -> None:
    sock = bound(V4, TCP, "10.9.0.1")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, FEW_SEGMENTS)
    worker.claim(sock, out=10, in_=5)
    sock.connect(tuple(peer))
    sock.sendall(bytes(size))
    if len(receive_all(sock, size)) != size:
        raise RuntimeError("data lost")


@scenario(check=within_one_percent)
def segments_and_interface_counters(stage: Stage) -> None:
    """Wire packets and bytes of GSO and GRO records agree with the interface within 1 %."""
    size = 1_500_000
    other = stage.beside()
    # Segmentation in software, just before the device: it then counts wire packets.
    set_feature("ve0", ETHTOOL_STSO, 0)
    set_feature("ve0", ETHTOOL_SGRO, 1)
    in_namespace(stage, other, "ve1", ETHTOOL_STSO, 0)
    in_namespace(stage, other, "ve1", ETHTOOL_SGRO, 1)
    with playing(stage):
        peer = ask(stage.spawn("sink", sink, size, netns=other))
        before = interface_counters("ve0")
        stage.spawn("source", source, peer, size).join()
        stage.join()
        after = interface_counters("ve0")
    grown = {name: after[name] - before[name] for name in after}
    (stage.directory / "counters").write_text(json.dumps({**grown, "netns": stage.netns}))


def udp_segments(records: np.ndarray, recorder: Recorder, directory: Path) -> list[str]:
    out = records[records["dir"] == 2]
    got = int(out["gso_segs"].sum())
    payload = int((out["len"].astype(np.int64) - out["hdr_len"].astype(np.int64)).sum())
    lines = []
    if recorder.engine.name == "module" and got != 5 * 10:
        lines.append(f"50 datagrams were sent, records say {got}")
    if recorder.engine.name == "module" and payload != 5 * 1000:
        lines.append(f"5000 bytes were sent, records say {payload}")
    return lines


def segment_sender(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, UDP)
    sock.connect(tuple(peer))
    sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 100)
    worker.claim(sock, out=5)
    for _ in range(5):
        sock.send(bytes(1000))
    wire.tell("sent")


def segment_receiver(worker: Worker, wire: Wire) -> None:
    sock = bound(V4, UDP)
    worker.claim(sock, in_=5)
    wire.tell(sock.getsockname())
    for _ in range(50):
        sock.recv(2000)


@scenario(check=udp_segments)
def udp_segmentation(stage: Stage) -> None:
    """UDP_SEGMENT: five sends of ten datagrams each."""
    with playing(stage):
        peer = ask(stage.spawn("receiver", segment_receiver))
        stage.spawn("sender", segment_sender, peer).hear()


def flood(worker: Worker, wire: Wire, count: int) -> None:
    sink = bound(V4, UDP)
    sock = bound(V4, UDP)
    worker.claim(sock)
    worker.claim(sink)
    for _ in range(count):
        sock.sendto(b"flood", sink.getsockname())


@scenario(lossy=True, engines=("module",))
def loss_is_counted(stage: Stage) -> None:
    """A reader with a tiny buffer that does not read: nothing wrong, every lost record counted."""
    with playing(stage):
        stage.spawn("flood", flood, max(2000, int(8000 * stage.scale)))


def one_datagram(worker: Worker, wire: Wire, peer: tuple[str, int], port: int) -> None:
    if not wire.hear():
        return
    sock = bound(V4, UDP, "", port)
    claim = worker.claim(sock, exact=True)
    sock.sendto(b"who?", tuple(peer))
    sock.recv(100)
    worker.count(claim, out=1, in_=1)
    worker.end(claim)


@scenario()
def pid_reused(stage: Stage) -> None:
    """Processes with one pid, one after another, on one port: told apart by start time."""
    last_pid = Path("/proc/sys/kernel/ns_last_pid")
    with playing(stage):
        peer = ask(stage.spawn("echo", udp_echo, V4, 4))
        with bound(V4, UDP) as sock:
            port = sock.getsockname()[1]
        first = stage.spawn("reuser0", one_datagram, peer, port)
        first.tell(True)
        first.join()
        for number in range(1, 4):
            for _ in range(200):
                try:
                    last_pid.write_text(str(first.pid - 1))
                except OSError as error:
                    raise Unable(f"ns_last_pid: {error.strerror}") from error
                child = stage.spawn(f"reuser{number}", one_datagram, peer, port)
                hit = child.pid == first.pid
                child.tell(hit)
                child.join()
                if hit:
                    break
            else:
                raise Unable("the pid was never given out again")
            time.sleep(0.02)  # start times are compared at clock ticks


def old_receiver(worker: Worker, wire: Wire) -> None:
    sock = bound(V4, UDP)
    wire.tell(sock.getsockname())
    wire.hear()
    claim = worker.claim(sock, exact=True)
    wire.tell("ready")
    for _ in range(COUNT):
        sock.recv(100)
    worker.count(claim, in_=COUNT)


def old_server(worker: Worker, wire: Wire) -> None:
    sock = listening(V4)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    wire.hear()
    claim = worker.claim(sock, any_address=True, in_=5, out=5)
    worker.also(claim, peer)
    wire.tell("ready")
    while data := peer.recv(100):
        peer.sendall(data)


def old_client(worker: Worker, wire: Wire, peer: tuple[str, int]) -> None:
    sock = bound(V4, TCP)
    sock.connect(tuple(peer))
    wire.tell("connected")
    wire.hear()
    worker.claim(sock, out=6, in_=5)
    wire.tell("ready")
    wire.hear()
    for _ in range(5):
        sock.sendall(b"older")
        receive_all(sock, 5)


@scenario()
def sockets_older_than_engine(stage: Stage) -> None:
    """Sockets that were there before the module was loaded."""
    receiver = stage.spawn("receiver", old_receiver)
    peer = ask(receiver)
    server = stage.spawn("server", old_server)
    client = stage.spawn("client", old_client, ask(server))
    client.hear()
    time.sleep(0.1)  # a delayed ACK may still be due
    stage.reload()
    with playing(stage):
        for child in (receiver, server, client):
            child.tell()
            child.hear()
        client.tell()
        sender = stage.spawn("sender", udp_sender, peer, V4, COUNT, False)
        sender.hear()
        sender.tell()


@scenario()
def queued_and_older_than_engine(stage: Stage) -> None:
    """A connection waits to be accepted when the engine comes: its listener's."""
    server = stage.spawn("server", accept_late)
    sock = bound(V4, TCP)
    stage.worker.claim(sock)
    sock.connect(ask(server))
    stage.reload()
    with playing(stage):
        sock.sendall(b"early")
        quiet()
        server.tell()
        receive_all(sock, 5)
        sock.close()


def speaker(worker: Worker, wire: Wire) -> None:
    """Accepts before the engine is there; after that, it sends when it is told to."""
    sock = listening(V4)
    wire.tell(sock.getsockname())
    peer, _ = sock.accept()
    wire.hear()
    worker.claim(peer, in_=1, out=1)
    wire.tell("ready")
    while wire.hear() == "speak":
        peer.sendall(b"talk!")


def shares_with_child(worker: Worker, wire: Wire, stage: Stage, peer: tuple[str, int]) -> None:
    """Like sshd: a child works on the connection, and its parent holds it as well."""
    sock = bound(V4, TCP)
    sock.connect(tuple(peer))
    child = stage.spawn("child", reads_shared, sock)
    wire.tell("connected")
    wire.hear()
    claim = worker.claim(sock, flags=["ambiguous"])
    child.tell()
    child.hear()
    wire.tell("claimed")
    wire.hear()
    worker.end(claim)
    child.tell()
    child.hear()
    sock.close()
    wire.tell("read")
    wire.hear()
    child.tell()
    child.join()


def reads_shared(worker: Worker, wire: Wire, sock: socket.socket) -> None:
    wire.hear()
    claim = worker.claim(sock, in_=1, flags=["ambiguous"])
    wire.tell()
    wire.hear()
    receive_all(sock, 5)
    worker.end(claim)
    worker.claim(sock, in_=1, out=1)
    wire.tell()
    receive_all(sock, 5)
    wire.hear()


@scenario(max_loose=2)
def shared_and_older_than_engine(stage: Stage) -> None:
    """Two processes had the socket before the module came: one of them, until one uses it."""
    server = stage.spawn("server", speaker)
    client = stage.spawn("client", shares_with_child, stage, ask(server))
    client.hear()
    time.sleep(0.1)  # a delayed ACK may still be due
    stage.reload()
    with playing(stage):
        for child in (client, server):
            child.tell()
            child.hear()
        server.tell("speak")
        time.sleep(0.1)
        client.tell()
        client.hear()
        server.tell("speak")
        time.sleep(0.1)
        client.tell()
        server.tell("leave")


SYS_EXIT = 60 if os.uname().machine == "x86_64" else 93


def headless(worker: Worker, wire: Wire) -> None:
    sock = bound(V4, UDP)
    wire.tell(sock.getsockname())

    def live_on() -> None:
        try:
            wire.hear()
            claim = worker.claim(sock, exact=True, in_=COUNT)
            wire.tell("ready")
            for _ in range(COUNT):
                sock.recv(100)
            wire.tell(claim)
        finally:
            os._exit(0)

    threading.Thread(target=live_on).start()
    LIBC.syscall(SYS_EXIT, 0)  # of this thread alone


@scenario()
def leader_thread_gone(stage: Stage) -> None:
    """The first thread has exited, another one has the sockets; they are older than the engine."""
    child = stage.spawn("headless", headless)
    peer = ask(child)
    stage.reload()
    with playing(stage):
        child.tell()
        child.hear()
        sender = stage.spawn("sender", udp_sender, peer, V4, COUNT, False)
        sender.hear()
        sender.tell()
        child.hear()
