# SPDX-License-Identifier: MIT
"""Works the module hard from all sides at once; as root in a guest, best on a debug kernel.

    python tests/vm/stress/stress.py MODULE.ko [SECONDS]

It asserts nothing about owners. What it is for shows in the kernel log: KASAN, lockdep, sleeping in
atomic context, leaks (it asks kmemleak for two scans at the end where there is one).
"""

from __future__ import annotations

import array
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

NETLINK_GENERIC = 16
PORT = 7000
SECOND_CPU = Path("/sys/devices/system/cpu/cpu1/online")


def tcp_server() -> None:
    """Accepts, forks a child that answers, closes its own copy: as inetd does."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.create_server(("127.0.0.1", PORT), backlog=512)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            connection.sendall(connection.recv(100) or b"x")
            os._exit(0)
        connection.close()


def tcp_client() -> None:
    """Connects, sends, and sometimes leaves without reading."""
    while True:
        try:
            with socket.create_connection(("127.0.0.1", PORT), timeout=5) as connection:
                connection.sendall(b"x" * random.randint(1, 5000))
                if random.random() < 0.7:
                    connection.recv(100)
        except OSError:
            time.sleep(0.01)


def udp() -> None:
    """Datagrams to receivers that come and go, unicast and multicast."""
    while True:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        ):
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            receiver.bind(("0.0.0.0", 7100))
            membership = socket.inet_aton("239.1.1.1") + socket.inet_aton("127.0.0.1")
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
            sender.setsockopt(
                socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1")
            )
            for size in (1, 1000, 30000):
                sender.sendto(b"u" * size, ("127.0.0.1", 7100))
                sender.sendto(b"m" * min(size, 1000), ("239.1.1.1", 7100))


def passing() -> None:
    """Descriptors over UNIX sockets, duplicated, and closed in flight."""
    while True:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        passed = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        passed.bind(("::1", 0))
        copies = [os.dup(passed.fileno()) for _ in range(3)]
        left.sendmsg(
            [b"f"],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [passed.fileno()]))],
        )
        passed.close()
        if random.random() < 0.7:
            _, ancillary, _, _ = right.recvmsg(10, 1000)
            for _, _, data in ancillary:
                copies += array.array("i", data)
        for copy in copies:
            os.close(copy)
        left.close()
        right.close()


def many_descriptors() -> None:
    """Forks with a thousand sockets open."""
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(1000)]
    while True:
        pid = os.fork()
        if pid == 0:
            for sock in sockets[::3]:
                sock.close()
            os.execv("/bin/true", ["true"])
        os.waitpid(pid, 0)


def namespaces() -> None:
    """Network namespaces with traffic that end while hooks may run."""
    send = "import socket; socket.socket(2, 2).sendto(b'x', ('127.0.0.1', 9))"
    script = f'ip link set lo up; ping -c1 -W1 127.0.0.1; exec python3 -c "{send}"'
    while True:
        subprocess.run(["unshare", "-n", "sh", "-c", script], capture_output=True, check=False)


def _family() -> tuple[int, list[int]]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as control:
        name = b"sniffer\0"
        attribute = struct.pack("=HH", 4 + len(name), 2) + name
        control.send(
            struct.pack("=IHHIIBBH", 20 + len(attribute), 16, 1, 1, 0, 3, 1, 0) + attribute
        )
        reply = control.recv(65536)
    if struct.unpack_from("=H", reply, 4)[0] == 2:
        raise OSError("no family")
    family = groups = 0
    offset = 20
    while offset + 4 <= len(reply):
        length, kind = struct.unpack_from("=HH", reply, offset)
        if kind == 1:
            family = struct.unpack_from("=H", reply, offset + 4)[0]
        if kind == 7:
            groups = offset
        offset += (length + 3) & ~3
    found = [
        struct.unpack_from("=I", reply, at + 4)[0]
        for at in range(groups, len(reply) - 8, 4)
        if struct.unpack_from("=HH", reply, at) == (8, 2)
    ]
    return family, found


def readers() -> None:
    """Listeners that join, read a little, stop reading, and go."""
    while True:
        try:
            _, groups = _family()
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as listener:
                for group in groups:
                    listener.setsockopt(270, 1, group)
                listener.settimeout(0.2)
                for _ in range(random.randint(0, 50)):
                    listener.recv(65536)
        except OSError:
            time.sleep(0.05)


def commands() -> None:
    """Every command, dumps included, and noise."""
    while True:
        try:
            family, _ = _family()
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as control:
                control.settimeout(0.2)
                for _ in range(50):
                    noise = random.randbytes(random.choice((0, 0, 4, 12, 40)))
                    flags = random.choice((1, 1, 5, 0x301))
                    command = random.randint(0, 12)
                    control.send(
                        struct.pack(
                            "=IHHIIBBH", 20 + len(noise), family, flags, 1, 0, command, 1, 0
                        )
                        + noise
                    )
                    try:
                        while True:
                            control.recv(65536)
                            if random.random() < 0.3:
                                break
                    except TimeoutError:
                        pass
        except OSError:
            time.sleep(0.05)


def hotplug() -> None:
    """Takes the second CPU, if there is one, away and brings it back."""
    while SECOND_CPU.exists():
        for state in ("0", "1"):
            SECOND_CPU.write_text(state)
            time.sleep(random.uniform(0.2, 1.5))


def loader(module: str) -> None:
    """Unloads and loads under all of it."""
    while True:
        time.sleep(random.uniform(1, 6))
        subprocess.run(["rmmod", "sniffer"], check=False)
        small = random.random() < 0.3
        options = ["max_sockets=64", "batch=1", "flush_ms=1"] if small else []
        subprocess.run(["insmod", module, *options], check=False)


def main() -> int:
    """Starts one process a job, ends them by pid, unloads, scans for leaks."""
    module = sys.argv[1]
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 60.0
    subprocess.run(["ip", "link", "set", "lo", "up", "multicast", "on"], check=True)
    subprocess.run(["ip", "route", "add", "239.0.0.0/8", "dev", "lo"], check=False)
    subprocess.run(["insmod", module], check=True)
    jobs: list[Callable[[], None]] = [
        tcp_server, tcp_client, tcp_client, udp, passing, many_descriptors, namespaces, readers,
        readers, commands, hotplug, lambda: loader(module),
    ]  # fmt: skip
    children = []
    for job in jobs:
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            try:
                job()
            finally:
                os._exit(1)
        children.append(pid)
    time.sleep(seconds)
    for pid in children:
        os.killpg(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)
    if SECOND_CPU.exists():
        SECOND_CPU.write_text("1")
    subprocess.run(["rmmod", "sniffer"], check=False)
    kmemleak = Path("/sys/kernel/debug/kmemleak")
    if kmemleak.exists():
        for _ in range(2):
            kmemleak.write_text("scan")
            time.sleep(6)
        print(kmemleak.read_text())
    print("stress: done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
