# SPDX-License-Identifier: MIT
"""Packets like former ones are recorded from memory: whatever changes in between must be seen.

Each test sends until the CPU remembers, changes one thing, and asks for the very next record.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from nlproto.kernel.netlink import PACKETS, Listener, Sniffer
from nlproto.records import wire
from nlproto.records.wire import lib

SO_COOKIE, PR_SET_NAME = 57, 15
WARM = 4  # datagrams: the third one is recorded from memory at the latest
LIBC = ctypes.CDLL(None, use_errno=True)


class Wire:
    """Records of one UDP port on loopback, as they come."""

    def __init__(self, family: int) -> None:
        os.sched_setaffinity(0, {0})  # one CPU's memory
        self.host = "127.0.0.1" if family == socket.AF_INET else "::1"
        self.family = family
        self._sniffer, self._listener = Sniffer(), Listener((PACKETS,), receive_bytes=16 << 20)
        self.sender = self.make()
        self.sender.bind((self.host, 0))

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._sniffer.close()
        self.sender.close()
        os.sched_setaffinity(0, range(os.cpu_count() or 1))

    def make(self, *options: int) -> socket.socket:
        sock = socket.socket(self.family, socket.SOCK_DGRAM)
        for option in options:
            sock.setsockopt(socket.SOL_SOCKET, option, 1)
        return sock

    def records(self, port: int, send: Callable[[], object]) -> tuple[np.void, np.void]:
        """The last record out and the last one in that concern `port` after `send`."""
        self._sniffer.flush()
        while self._listener.recv(0) is not None:
            pass
        send()
        self._sniffer.flush()
        found = []
        while (received := self._listener.recv(0)) is not None:
            found += [r for r in wire.decode_batch(received[1]).records if r["dport"] == port]
        out = [r for r in found if r["dir"] == lib.SNIFFER_DIR_OUT]
        came = [r for r in found if r["dir"] == lib.SNIFFER_DIR_IN]
        assert out and came, found
        return out[-1], came[-1]

    def talk(self, port: int, times: int = 1) -> Callable[[], None]:
        def send() -> None:
            for _ in range(times):
                try:
                    self.sender.sendto(b"x", (self.host, port))
                except ConnectionRefusedError:  # reported by the one before
                    self.sender.sendto(b"x", (self.host, port))

        return send

    def warm(self, receiver: socket.socket) -> int:
        """Sends until it is remembered; the port of `receiver`."""
        port = int(receiver.getsockname()[1])
        out, came = self.records(port, self.talk(port, WARM))
        assert out["how"] == lib.SNIFFER_HOW_CONTEXT and out["cookie"] == cookie(self.sender)
        assert came["how"] == lib.SNIFFER_HOW_SOCKET and came["cookie"] == cookie(receiver)
        assert out["tgid"] == came["tgid"] == os.getpid()
        return port


def cookie(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])
def udp(request: pytest.FixtureRequest, loaded: None) -> Iterator[Wire]:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with Wire(request.param) as found:
        yield found


def in_child(work: Callable[[], None]) -> None:
    """Runs `work` in a child of fork(); its failure is ours."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException as error:
            os.write(2, f"in the child: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_another_name_and_another_user(udp: Wire) -> None:
    with udp.make() as receiver:
        receiver.bind((udp.host, 0))
        port = udp.warm(receiver)
        before = open("/proc/self/comm", "rb").read().strip()
        try:
            LIBC.prctl(PR_SET_NAME, b"renamed", 0, 0, 0)
            out, came = udp.records(port, udp.talk(port))
        finally:
            LIBC.prctl(PR_SET_NAME, before, 0, 0, 0)
        assert out["comm"] == came["comm"] == b"renamed"

        def as_somebody() -> None:
            udp.records(port, udp.talk(port, WARM))
            os.setresuid(1234, 0, 0)
            out, came = udp.records(port, udp.talk(port))
            assert out["uid"] == 1234 and out["tgid"] == os.getpid()
            assert came["uid"] == 0, "its owner is the parent"

        in_child(as_somebody)


def test_another_thread_and_another_process(udp: Wire) -> None:
    with udp.make() as receiver:
        receiver.bind((udp.host, 0))
        port = udp.warm(receiver)

        def in_thread() -> tuple[np.void, int]:
            told = []

            def work() -> None:
                out, _ = udp.records(port, udp.talk(port))
                told.append((out, threading.get_native_id()))

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            return told[0]

        out, tid = in_thread()
        assert out["tid"] == tid != os.getpid() and out["tgid"] == os.getpid()
        out, _ = udp.records(port, udp.talk(port))
        assert out["tid"] == os.getpid()

        def work() -> None:
            out, came = udp.records(port, udp.talk(port))
            assert out["tgid"] == os.getpid() and out["how"] == lib.SNIFFER_HOW_CONTEXT
            assert came["tgid"] == os.getppid()
            assert out["flags"] & came["flags"] & lib.SNIFFER_F_SHARED
            receiver.recv(1)  # the child has used it, too
            _, came = udp.records(port, udp.talk(port))
            assert came["tgid"] == os.getpid()

        in_child(work)
        # nobody else has them any more
        out, came = udp.records(port, udp.talk(port))
        assert out["tgid"] == came["tgid"] == os.getpid()
        assert not came["flags"] & lib.SNIFFER_F_SHARED


def test_a_socket_that_fits_better(udp: Wire) -> None:
    with (
        udp.make(socket.SO_REUSEADDR) as anybody,
        udp.make(socket.SO_REUSEADDR) as bound,
        udp.make(socket.SO_REUSEADDR) as connected,
    ):
        anybody.bind(("", 0))
        port = udp.warm(anybody)
        for better in (bound, connected):
            better.bind((udp.host, port))
            if better is connected:
                better.connect(udp.sender.getsockname())
            _, came = udp.records(port, udp.talk(port))
            better.settimeout(10)
            better.recv(1)
            assert came["cookie"] == cookie(better)
            udp.records(port, udp.talk(port, WARM))
        # they part, and are looked for where they were
        connected.close()
        _, came = udp.records(port, udp.talk(port))
        assert came["cookie"] == cookie(bound)
        bound.close()
        _, came = udp.records(port, udp.talk(port))
        assert came["cookie"] == cookie(anybody)


def test_one_that_fits_no_more(udp: Wire) -> None:
    subprocess.run(["ip", "link", "add", "elsewhere", "type", "dummy"], check=True)
    try:
        for change in ("connect", "device", "close"):
            with udp.make() as receiver:
                receiver.bind((udp.host, 0))
                port = udp.warm(receiver)
                if change == "connect":
                    receiver.connect((udp.host, 9))
                elif change == "device":
                    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"elsewhere")
                else:
                    receiver.close()
                _, came = udp.records(port, udp.talk(port))
                assert came["how"] == lib.SNIFFER_HOW_NO_SOCKET, change
                assert came["cookie"] == came["tgid"] == 0
    finally:
        subprocess.run(["ip", "link", "delete", "elsewhere"], check=True)


def test_several_that_share_a_port(udp: Wire) -> None:
    with udp.make(socket.SO_REUSEPORT) as one, udp.make(socket.SO_REUSEPORT) as other:
        one.bind((udp.host, 0))
        port = udp.warm(one)
        other.bind((udp.host, port))
        for sock in (one, other):
            sock.setblocking(False)
        while True:  # what has come so far
            try:
                one.recv(1)
            except BlockingIOError:
                break
        for _ in range(16):
            with udp.make() as sender:  # another port, another choice
                sender.bind((udp.host, 0))
                udp.sender, before = sender, udp.sender
                _, came = udp.records(port, udp.talk(port, WARM))
                udp.sender = before
            got = []
            for sock in (one, other):
                try:
                    while sock.recv(1):
                        got.append(sock)
                except BlockingIOError:
                    pass
            assert len(got) == WARM and came["cookie"] == cookie(got[-1])


def test_a_connection_that_another_process_uses(udp: Wire) -> None:
    with socket.create_server((udp.host, 0), family=udp.family) as listener:
        client = socket.create_connection(listener.getsockname()[:2])
        server, _ = listener.accept()
    with client, server:
        port = int(server.getsockname()[1])

        def exchange(times: int = 1) -> Callable[[], None]:
            def send() -> None:
                for _ in range(times):
                    client.sendall(b"x")
                    server.recv(1)

            return send

        out, came = udp.records(port, exchange(WARM))
        assert out["tgid"] == came["tgid"] == os.getpid()
        assert out["cookie"] == cookie(client) and came["cookie"] == cookie(server)

        def work() -> None:
            out, came = udp.records(port, exchange())
            assert out["tgid"] == os.getpid()
            assert came["tgid"] == os.getppid()
            out, came = udp.records(port, exchange())
            assert out["tgid"] == came["tgid"] == os.getpid()

        in_child(work)
        out, came = udp.records(port, exchange(WARM))
        assert out["tgid"] == came["tgid"] == os.getpid()
        server.close()
        out, _ = udp.records(port, lambda: client.sendall(b"last"))
        assert out["cookie"] == cookie(client)
