# SPDX-License-Identifier: MIT
"""Broken packets and random control messages: nothing breaks, the account closes, names go on.

PACKET_HUNTER_LONG=1 plays 100,000 of each; the seed is printed.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from attribution.recorder import Recorder, forget_ebpf
from commands import configure
from sockets import LOOPBACK, listening, udp_receiver
from test_permissions import (
    as_a_container_with_cap_net_admin,
    as_a_plain_user,
    as_root,
    as_root_of_a_user_and_network_namespace,
    as_root_of_a_user_namespace,
)

from nlproto.kernel.netlink import Connection, Sniffer, resolve
from nlproto.records.wire import lib

pytestmark = pytest.mark.usefixtures("loopback_is_up")

COUNT = 100_000 if os.environ.get("PACKET_HUNTER_LONG") else 2_000
SEED = int(os.environ.get("PACKET_HUNTER_SEED", time.time_ns() % 2**32))
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
NETWORK = "10.213.7"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def through_tun() -> Iterator[Callable[[bytes], None]]:
    """What is written arrives as from a network, beginning with the IP header."""
    Path("/dev/net").mkdir(exist_ok=True)
    subprocess.run(["modprobe", "tun"], check=False)
    if not Path("/dev/net/tun").exists():
        os.mknod("/dev/net/tun", 0o600 | 0o020000, os.makedev(10, 200))
    tun = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH14x", b"broken0", IFF_TUN | IFF_NO_PI))
        _ip("addr", "add", f"{NETWORK}.1/24", "dev", "broken0")
        _ip("addr", "add", "fd13::1/64", "dev", "broken0", "nodad")
        _ip("link", "set", "broken0", "up")

        def send(packet: bytes) -> None:
            with suppress(OSError):  # the kernel may refuse one by its first byte
                os.write(tun, packet)

        yield send
    finally:
        os.close(tun)


@contextmanager
def through_veth() -> Iterator[Callable[[bytes], None]]:
    """What is sent arrives behind an Ethernet header, the type of which may lie."""
    subprocess.run(["modprobe", "veth"], check=False)
    _ip("link", "add", "broken1", "type", "veth", "peer", "name", "broken2")
    with ExitStack() as ends:
        ends.callback(_ip, "link", "del", "broken1")
        _ip("addr", "add", f"{NETWORK}.1/24", "dev", "broken1")
        _ip("addr", "add", "fd13::1/64", "dev", "broken1", "nodad")
        for name in ("broken1", "broken2"):
            _ip("link", "set", name, "up")
        target = bytes.fromhex(Path("/sys/class/net/broken1/address").read_text().replace(":", ""))
        raw = ends.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
        raw.bind(("broken2", 0))

        def send(packet: bytes) -> None:
            kind = 0x86DD if packet[:1] and packet[0] >> 4 == 6 else 0x0800
            with suppress(OSError):
                raw.send(target + b"\2\0\0\0\0\1" + struct.pack(">H", kind) + packet)

        yield send


def checksum(data: bytes) -> int:
    """Of the Internet, RFC 1071."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _payload(generator: random.Random, port: int) -> tuple[int, bytes]:
    """(protocol, bytes) of a transport header, right or not."""
    kind = generator.choice(
        (6, 6, 17, 17, 1, 58, 132, 136, 47, 4, 41, 50, generator.randrange(256))
    )
    data = generator.randbytes(generator.choice((0, 1, 4, 8, 40, 200)))
    ports = struct.pack(">HH", generator.randrange(65536), generator.choice((port, port, 0, 9)))
    if kind == 6:
        offset = generator.choice((5, 5, 5, 0, 4, 6, 15))
        rest = struct.pack(">IIBBHHH", 1, 1, offset << 4, generator.randrange(256), 99, 0, 0)
        return 6, ports + rest + data
    if kind in (17, 136):
        length = generator.choice((8 + len(data), 8 + len(data), 0, 7, 65535))
        return kind, ports + struct.pack(">HH", length, 0) + data
    return kind, ports + data


def broken(generator: random.Random, port: int) -> bytes:
    """One packet to `port`: mostly with one thing wrong, so that it comes far; or noise."""
    protocol, data = _payload(generator, port)
    if generator.random() < 0.5:
        fragment = generator.choice((0, 0, 0, 0, 0x2000, 100, 0x3FFF, 0x8000))
        options = generator.randbytes(4 * generator.choice((0, 0, 0, 1, 10)))
        source, target = (socket.inet_aton(f"{NETWORK}.{n}") for n in (generator.randrange(256), 1))
        head = bytearray(
            struct.pack(
                ">BBHHHBBH4s4s",
                0x40 | (5 + len(options) // 4), 0, 20 + len(options) + len(data),
                generator.randrange(65536), fragment, 64, protocol, 0, source, target,
            )
            + options
        )  # fmt: skip
        if generator.random() < 0.3:
            head[generator.choice((0, 2, 3, 6, 7, 8, 9))] = generator.randrange(256)
        head[10:12] = struct.pack(">H", checksum(bytes(head[:10]) + b"\0\0" + bytes(head[12:])))
        packet = bytes(head) + data
    else:
        chain = b""
        first = protocol
        for _ in range(generator.choice((0, 0, 0, 1, 2, 8, 60))):
            kind = generator.choice((0, 43, 44, 60, 51, 135, 59))
            chain = (
                bytes([first, generator.choice((0, 0, 0, 1, 255))]) + generator.randbytes(6) + chain
            )
            first = kind
        length = len(chain) + len(data)
        if generator.random() < 0.2:
            length = generator.randrange(65536)
        ends = [socket.inet_pton(socket.AF_INET6, end) for end in ("fd13::7", "fd13::1")]
        packet = struct.pack(">IHBB16s16s", 6 << 28, length, first, 64, *ends) + chain + data
    chance = generator.random()
    if chance < 0.15:
        packet = packet[: generator.randrange(len(packet) + 1)]
    elif chance < 0.25:
        changed = bytearray(packet)
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
        packet = bytes(changed)
    elif chance < 0.27:
        packet = generator.randbytes(generator.randrange(1, 1400))
    return packet or b"\x45"


@pytest.mark.patience(600 + COUNT // 50)
@pytest.mark.parametrize("engine", ["module", "ebpf", "packet"])
@pytest.mark.parametrize("way", [through_tun, through_veth])
def test_broken_packets_break_nothing(
    request: pytest.FixtureRequest,
    way: Callable[[], AbstractContextManager[Callable[[bytes], None]]],
    engine: str,
) -> None:
    if engine == "ebpf" and not Path("/sys/kernel/btf/vmlinux").exists():
        pytest.skip("this kernel has no BTF")
    request.getfixturevalue("loaded" if engine == "module" else "unloaded")
    print(f"seed {SEED}")
    generator = random.Random(SEED)
    with ExitStack() as ends:
        send = ends.enter_context(way())
        server = ends.enter_context(socket.create_server((f"{NETWORK}.1", 0)))
        port = server.getsockname()[1]
        receivers = [ends.enter_context(socket.socket(f, socket.SOCK_DGRAM)) for f in (2, 10)]
        for receiver, address in zip(receivers, (f"{NETWORK}.1", "fd13::1"), strict=True):
            receiver.bind((address, port))
        recorder = ends.enter_context(Recorder(engine))
        for number in range(COUNT):
            send(broken(generator, port))
            if number % 500 == 0:
                recorder.read(0)
                for receiver in receivers:
                    with suppress(BlockingIOError):
                        while True:
                            receiver.recv(1, socket.MSG_DONTWAIT)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((LOOPBACK, 0))
            whole = sender.getsockname()[1]
            sender.sendto(b"whole", (f"{NETWORK}.1", port))
            if engine == "packet":  # which asks, as long as there is somebody to ask about
                recorder.read(1)
        records = recorder.finish()
        faults = recorder.faults(records, lossy=engine == "packet")
        if engine == "ebpf":
            forget_ebpf(None)
    print(f"{len(records)} records of {COUNT} packets")
    assert [fault for fault in faults if "nothing was lost" not in fault] == []
    # a broken packet may have the same port
    ours = (records["sport"] == whole) & (records["saddr"][:, 0] == 127)
    assert set(records[ours]["tgid"]) == {os.getpid()}
    assert len(records) > COUNT / 20


WHO: dict[str, Callable[[], None]] = {
    "root": as_root,
    "nobody": as_a_plain_user,
    "root of a user namespace": as_root_of_a_user_namespace,
    "root of a user and network namespace": as_root_of_a_user_and_network_namespace,
    "a container with CAP_NET_ADMIN": as_a_container_with_cap_net_admin,
}


def _message(generator: random.Random, family: int) -> bytes:
    """One control message: header fields and attributes mostly plausible, sometimes not."""
    attributes = b""
    for _ in range(generator.choice((0, 1, 1, 2, 5))):
        data = generator.randbytes(generator.choice((0, 1, 4, 8, 9, 40)))
        if generator.random() < 0.5:
            data = struct.pack("=Q", generator.choice((0, 1, 20, 252, 253, 1000, 2**32 - 1)))
            data = data[: generator.choice((4, 8))]
        length = 4 + len(data)
        if generator.random() < 0.1:
            length = generator.choice((0, 3, 5, 60000))
        kind = generator.randrange(lib.SNIFFER_A_PAD + 3) | generator.choice(
            (0, 0, 0, 0x8000, 0x4000)
        )
        attributes += struct.pack("=HH", length, kind) + data + bytes(-len(data) % 4)
    body = (
        struct.pack("=BBH", generator.randrange(14), generator.choice((1, 1, 0, 2, 255)), 0)
        + attributes
    )
    flags = generator.choice((1, 5, 0x301, 0x305, 0, generator.randrange(65536)))
    length = 16 + len(body)
    if generator.random() < 0.05:
        length = generator.choice((0, 15, 16, 17, 2**31))
    kind = family if generator.random() < 0.95 else generator.randrange(64)
    return struct.pack("=IHHII", length, kind, flags, generator.randrange(9), 0) + body


def _babble(become: Callable[[], None], family: int, count: int, seed: int) -> None:
    become()
    generator = random.Random(seed)
    control = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16)
    control.setblocking(False)
    for number in range(count):
        with suppress(OSError):
            control.send(_message(generator, family))
        with suppress(OSError):
            while generator.random() < 0.9:
                control.recv(65536)
        if number % 997 == 0:  # dumps that nobody reads to the end
            control.close()
            control = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16)
            control.setblocking(False)


@pytest.mark.patience(600 + COUNT // 50)
@pytest.mark.parametrize("who", WHO)
def test_random_control_messages_break_nothing(loaded: None, who: str) -> None:
    """The module answers as before, and its settings are within their limits."""
    print(f"seed {SEED}")
    with Connection() as connection:
        family = resolve(connection, "sniffer").id
    with Sniffer() as sniffer:
        before = sniffer.info().copy()
    pid = os.fork()
    if pid == 0:
        try:
            _babble(WHO[who], family, COUNT // len(WHO), SEED)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    with Sniffer() as sniffer:
        after = sniffer.info().copy()
        assert 1 <= int(after["batch"]) <= lib.SNIFFER_BATCH_MAX
        assert 1 <= int(after["flush_ms"]) <= lib.SNIFFER_FLUSH_MS_MAX
        if who != "root":
            assert (after["batch"], after["flush_ms"]) == (before["batch"], before["flush_ms"])
        configure(sniffer, lib.SNIFFER_BATCH_DEFAULT, lib.SNIFFER_FLUSH_MS_DEFAULT)
    with listening() as seen, udp_receiver() as receiver:
        port = receiver.getsockname()[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", (LOOPBACK, port))
    assert set(seen.to_port(port, lib.SNIFFER_DIR_IN)["tgid"]) == {os.getpid()}
