# SPDX-License-Identifier: MIT
"""What the module tells after an exec, a refused connection, a CPU's end, with full tables."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest
from sockets import (
    LOOPBACK,
    cookie_of,
    insert,
    known_socket,
    listening,
    reasons,
    receivers,
    send,
    udp_receiver,
)

from nlproto.engines.module import ModuleEngine
from nlproto.host import procfs
from nlproto.kernel.netlink import Sniffer
from nlproto.records import wire
from nlproto.records.wire import Batch, lib
from waiting import until

pytestmark = pytest.mark.usefixtures("loopback_is_up")

SECOND_CPU = Path("/sys/devices/system/cpu/cpu1/online")
TALK = """
import socket
with socket.create_server(("127.0.0.1", {port})) as server:
    for _ in range(5):
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        client.close()
        peer.close()
"""


def test_nothing_is_left_of_the_name_of_an_earlier_program(loaded: None) -> None:
    """In the bytes on the wire, behind the end of a shorter one."""
    script = "import os, socket; s = socket.socket(2, 2); os.execv('/bin/sleep', ['sleep', '600'])"
    child = subprocess.Popen([sys.executable, "-c", script])

    def exe() -> bytes:
        with Sniffer() as sniffer:
            for _, found in sniffer._ask(lib.SNIFFER_CMD_GET_PROCESS, dump=True):
                raw = bytes(found[lib.SNIFFER_A_PROCESS]).ljust(wire.PROCESS.itemsize, b"\0")
                one = np.frombuffer(raw, wire.PROCESS)[0]
                if one["tgid"] == child.pid:
                    return bytes(one["exe"].tobytes())
        return b""

    program = os.path.realpath("/bin/sleep").encode()
    try:
        until(lambda: exe().startswith(program), what="exec")
        assert not exe().rstrip(b"\0").removeprefix(program)
    finally:
        child.kill()
        child.wait()


def test_a_socket_that_connects_after_a_refusal_stays_known(
    module_file: Path, unloaded: None
) -> None:
    """Where the end of sockets is not told, TCP_CLOSE is taken for it, until it connects again."""
    insert(module_file, f"refuse={lib.SNIFFER_PROBE_FREE}")
    with (
        Sniffer() as sniffer,
        socket.create_server((LOOPBACK, 0)) as server,
        closing(socket.socket()) as again,
        closing(socket.socket()) as once,
    ):
        for sock in (again, once):
            with suppress(ConnectionRefusedError):
                sock.connect((LOOPBACK, 9))
        again.connect(server.getsockname())
        cookies = [cookie_of(sock) for sock in (once, again)]
        until(lambda: sniffer.socket(cookies[0]) is None)
        assert sniffer.socket(cookies[1]) is not None


@pytest.mark.skipif(not SECOND_CPU.exists(), reason="one CPU that can be taken away is needed")
def test_what_a_cpu_sent_that_left_is_told(loaded: None) -> None:
    with ModuleEngine(("packets",)) as engine, closing(udp_receiver()) as receiver:
        everywhere = os.sched_getaffinity(0)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            os.sched_setaffinity(0, {1})
            for _ in range(10):
                sender.sendto(b"x", receiver.getsockname())
            os.sched_setaffinity(0, everywhere)
        SECOND_CPU.write_text("0")
        try:
            delivered = sum(len(b.records) for b in engine.finish() if isinstance(b, Batch))
        finally:
            SECOND_CPU.write_text("1")
        tails = engine.closing
        sent = int(tails["record_seq"].sum()) - int(engine.opening["record_seq"].sum())
    assert 1 in tails["cpu"]
    assert delivered == sent >= 20


def test_what_a_full_process_table_has_not_taken_is_not_called_gone(
    module_file: Path, unloaded: None
) -> None:
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        port = sock.getsockname()[1]
    insert(module_file, "max_processes=1")
    with listening() as seen, closing(udp_receiver()):  # that is one, unless it is full already
        subprocess.run([sys.executable, "-c", TALK.format(port=port)], check=True)
    records = seen.records
    ours = records[(records["dport"] == port) | (records["sport"] == port)]
    assert len(ours) > 20
    assert reasons(ours) <= {"table_full", "context"}


def test_setuid_and_exec_are_followed_by_who_only_has_a_socket(loaded: None) -> None:
    with listening() as seen, closing(udp_receiver()) as receiver:
        port = receiver.getsockname()[1]
        receiver.setblocking(False)
        receiver.set_inheritable(True)
        pid = os.fork()
        if pid == 0:
            try:
                with suppress(BlockingIOError):
                    receiver.recv(1)  # named after it, as root
                os.setresuid(65534, 65534, 65534)
                os.execv("/bin/sleep", ["sleep", "600"])
            finally:
                os._exit(1)
        until(lambda: os.readlink(f"/proc/{pid}/exe") == os.path.realpath("/bin/sleep"))
        send(port)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert receivers(seen, port) == {(pid, 65534)}


def test_a_process_that_lived_a_moment_has_its_program_and_its_end_told(loaded: None) -> None:
    script = "import os, socket; socket.socket(2, 2); os._exit(0)"
    words = [sys.executable, "-c", script, "x" * lib.SNIFFER_ARGS_LEN]
    with listening("processes") as seen:
        child = subprocess.Popen(words)
        child.wait()
    events = [event for event in seen.processes if event.tgid == child.pid]
    assert [event.event for event in events] == [lib.SNIFFER_EVENT_SEEN, lib.SNIFFER_EVENT_EXIT]
    first = events[0]
    own = procfs.parents(os.getpid(), time.clock_gettime_ns(time.CLOCK_BOOTTIME))
    parents = tuple((one.pid, one.comm) for one in own[: lib.SNIFFER_PARENTS])
    assert first.exe == os.path.realpath(sys.executable)
    assert first.ppid == os.getpid()
    assert first.parents == parents
    args = b"".join(word.encode() + b"\0" for word in words)
    assert (first.args, first.args_len) == (args[: lib.SNIFFER_ARGS_LEN], len(args))
    assert (events[1].parents, events[1].args) == ((), b"")
    assert first.uid == os.getuid()
    assert first.pidns == os.stat("/proc/self/ns/pid").st_ino
    assert first.cgroup_id > 0


def test_exec_is_told_with_the_new_program(loaded: None) -> None:
    script = (
        "import os, socket; s = socket.socket(2, 2); os.execv('/bin/true', ['true', 'a b', ''])"
    )
    with listening("processes") as seen:
        child = subprocess.Popen([sys.executable, "-c", script])
        child.wait()
    (told,) = (
        event
        for event in seen.processes
        if event.tgid == child.pid and event.event == lib.SNIFFER_EVENT_EXEC
    )
    assert told.exe == os.path.realpath("/bin/true")
    assert told.args == b"true\0a b\0\0"
    assert told.parents[0][0] == os.getpid()


def test_setuid_is_followed(loaded: None) -> None:
    with Sniffer() as sniffer, listening() as seen, closing(udp_receiver()) as receiver:
        port = receiver.getsockname()[1]
        pid = os.fork()
        if pid == 0:
            try:
                os.setuid(65534)
                receiver.recv(10)  # blocks in the kernel: with a timeout Python would poll
            finally:
                os._exit(0)
        cookie = cookie_of(receiver)
        until(lambda: int(known_socket(sniffer, cookie)[0]["tgid"]) == pid)
        send(port)
        os.waitpid(pid, 0)
    assert receivers(seen, port) == {(pid, 65534)}


def test_setuid_is_followed_by_who_only_receives(loaded: None) -> None:
    ready, told = os.pipe()
    with listening() as seen, closing(udp_receiver()) as receiver:
        port = receiver.getsockname()[1]
        receiver.setblocking(False)
        pid = os.fork()
        if pid == 0:
            try:
                with suppress(BlockingIOError):
                    receiver.recv(1)  # named after it, as root
                os.setuid(65534)
                os.write(told, b"x")
                time.sleep(60)
            finally:
                os._exit(0)
        os.read(ready, 1)
        send(port)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert receivers(seen, port) == {(pid, 65534)}


UNKNOWN = """
import os, socket, sys
server = socket.create_server(("127.0.0.1", 0), backlog=64)
pairs = []
for _ in range(20):
    client = socket.create_connection(server.getsockname())
    pairs.append((client, server.accept()[0]))
print("made", flush=True)
sys.stdin.readline()
for client, _ in pairs[:10]:
    client.close()
    os.write(1, b"closed\\n")
    sys.stdin.readline()
sys.stdin.readline()
"""


def test_what_gets_known_by_its_last_packet_is_not_looked_at_later(
    module_file: Path, unloaded: None
) -> None:
    """Connections that a full table has not taken: the FIN makes an entry of a socket that goes.

    Its file has no reference any more, and its release has been told: a pointer to it would stay.
    Who asks for its holders, or ends as its user, would follow it; KASAN sees that.
    """
    insert(module_file, "max_sockets=64")
    fill = [udp_receiver() for _ in range(70)]
    child = subprocess.Popen(
        [sys.executable, "-c", UNKNOWN], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin and child.stdout
    with Sniffer() as sniffer, listening() as seen:
        assert child.stdout.readline() == b"made\n"
        for sock in fill:
            sock.close()
        until(lambda: int(sniffer.info()["sockets"]) < 20)
        known = {int(entry["cookie"]) for entry, _ in sniffer.sockets()}
        child.stdin.write(b"\n")
        found = 0
        for _ in range(10):
            child.stdin.flush()
            assert child.stdout.readline() == b"closed\n"
            found += sum(int(entry["cookie"]) not in known for entry, _ in sniffer.sockets())
            child.stdin.write(b"\n")
        child.communicate(b"\n")
        sniffer.sockets()
    assert found
    fins = seen.records[(seen.records["tcp_flags"] & 1) > 0]
    assert set(fins[fins["dir"] == lib.SNIFFER_DIR_OUT]["tgid"]) <= {0, child.pid}
