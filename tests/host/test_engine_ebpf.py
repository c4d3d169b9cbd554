# SPDX-License-Identifier: MIT
"""Engine ebpf on the kernel that runs us, whole or in parts: names, account, and that it goes."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from loading import records_of
from nlproto.engines.bpf_programs import OBJECT, why_in_parts
from nlproto.engines.ebpf import _Sweep
from nlproto.engines.engine import Engine, open_engine
from nlproto.kernel.bpf import NoBpf
from nlproto.pipeline.account import Account
from nlproto.records.first_bytes import FirstBytes
from nlproto.records.process_event import ProcessEvent
from nlproto.records.wire import (
    RECORD,
    Batch,
    FirstBytesBatch,
    is_named,
    lib,
)
from waiting import stand_in, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: it loads programs")

_MPTCP = 262  # IPPROTO_MPTCP

SCRIPT = """
from nlproto.errors import Error
from nlproto.engines.engine import open_engine
try:
    open_engine("ebpf", print).__exit__(None, None, None)
    print("it runs")
except Error as error:
    print(error)
"""
TRY = (sys.executable, "-c", SCRIPT)


def skip_unless_installed(error: NoBpf) -> None:
    """A kernel may refuse programs; what build.sh has to install must be there."""
    ctypes.CDLL("libbpf.so.1")
    assert OBJECT.exists(), error
    pytest.skip(str(error))


@pytest.fixture
def engine() -> Iterator[Engine]:
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(open_engine("ebpf", print))
        except NoBpf as error:
            skip_unless_installed(error)
        yield opened


def tcp(kind: int) -> socket.socket:
    """A socket of TCP or MPTCP. Servers written in Go listen by MPTCP."""
    try:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM, kind)
    except OSError as error:
        pytest.skip(f"MPTCP: {error}")


KINDS = pytest.mark.parametrize(
    ("listens", "connects"), [(0, 0), (_MPTCP, 0), (_MPTCP, _MPTCP)], ids=["tcp", "plain", "mptcp"]
)


@KINDS
def test_every_packet_of_a_connection_is_ours(engine: Engine, listens: int, connects: int) -> None:
    account = Account()
    account.open(engine.opening, engine.instance)
    with tcp(listens) as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with tcp(connects) as client:
            client.connect(("127.0.0.1", port))
            accepted, _ = server.accept()
            with accepted:
                accepted.send(b"hello")
            assert client.recv(100) == b"hello" and client.recv(100) == b""
    records = records_of(engine, account)
    ours = records[(records["sport"] == port) | (records["dport"] == port)]
    # both see three packets of the handshake, one of data and two ends, at least
    assert len(ours) >= 12
    assert all(is_named(how) for how in ours["how"].tolist())
    assert set(ours["tgid"].tolist()) == {os.getpid()}
    assert set(ours["netns"].tolist()) == {os.stat("/proc/self/ns/net").st_ino}
    assert account.closes(), account.as_dict()


def test_the_first_bytes_come_with_their_records(engine: Engine) -> None:
    assert engine.want_first_bytes(True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            with accepted, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
                client.send(b"through TCP")
                assert accepted.recv(100)
                datagrams.sendto(b"through UDP", ("127.0.0.1", port))
    kept, parts = FirstBytes(), [np.zeros(0, RECORD)]
    for event in (*engine.read(0.1), *engine.finish()):
        if isinstance(event, FirstBytesBatch):
            kept.keep(event)
        elif isinstance(event, Batch):
            parts.append(event.records)
    records = np.concatenate(parts)
    ours = records[(records["sport"] == port) | (records["dport"] == port)]
    payloads = []
    for record in ours:
        snap = kept.find(record)
        assert snap is not None, record
        assert len(snap.data) == record["len"]
        assert struct.unpack_from("!HH", snap.data, 20) == (record["sport"], record["dport"])
        payloads.append(snap.data[record["hdr_len"] :])
    assert payloads.count(b"through TCP") == 2  # as it was sent, as it came
    # a datagram for a port where nobody listens is no packet of a socket's on its way in
    assert payloads.count(b"through UDP") >= 1


@KINDS
def test_a_listener_older_than_the_engine_names_its_connections(
    listens: int, connects: int
) -> None:
    with tcp(listens) as server, ExitStack() as stack:
        server.bind(("127.0.0.1", 0))
        server.listen()
        try:
            engine = stack.enter_context(open_engine("ebpf", print))
        except NoBpf as error:
            skip_unless_installed(error)
        port = server.getsockname()[1]
        with tcp(connects) as client:
            client.connect(("127.0.0.1", port))
            client.send(b"before accept")
            records = records_of(engine, Account())
    ours = records[(records["sport"] == port) | (records["dport"] == port)]
    assert len(ours) and set(ours["tgid"].tolist()) == {os.getpid()}


@pytest.mark.parametrize("proto", [socket.IPPROTO_TCP, socket.IPPROTO_UDP])
def test_a_frame_that_a_process_made_is_its_own(engine: Engine, proto: int) -> None:
    """Netfilter sees none. In parts they were the kernel's, or their socket predated."""
    if not why_in_parts():
        pytest.skip("only in parts: nothing else sees what a packet socket sends")
    port = 9
    loopback = socket.inet_aton("127.0.0.1")
    transport = struct.pack("!HHIIBBHHH", port, port, 20 << 16, 0, 5 << 4, 2, 64, 0, 0)
    head = struct.pack("!BBHIBBH", 0x45, 0, 20 + len(transport), 0, 64, proto, 0)
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as sender:
        sender.sendto(head + 2 * loopback + transport, ("lo", 0x0800, 0, 0, bytes(6)))
    records = records_of(engine, Account())
    ours = records[(records["sport"] == port) & (records["dport"] == port)]
    sent = ours[ours["dir"] == lib.SNIFFER_DIR_OUT]
    assert sent["tgid"].tolist() == [os.getpid()]


def test_loss_is_counted_to_the_record() -> None:
    from nlproto.engines.ebpf import EbpfEngine

    with ExitStack() as stack:
        try:
            engine = stack.enter_context(EbpfEngine(print, ring_bytes=1 << 16))
        except NoBpf as error:
            skip_unless_installed(error)
        account = Account()
        account.open(engine.opening, engine.instance)
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        ):
            receiver.bind(("127.0.0.1", 0))
            for _ in range(3000):
                sender.sendto(b"x", receiver.getsockname())
        records_of(engine, account)
    assert account.closes(), account.as_dict()
    assert account.lost["alloc"] > 1000
    assert account.lost["socket"] == 0


def test_what_another_engine_has_begun_to_tell_is_left_to_it(engine: Engine) -> None:
    account = Account()
    account.open(engine.opening, engine.instance)
    with socket.socket(type=socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        with socket.socket(type=socket.SOCK_DGRAM) as sender:
            sender.sendto(b"before", receiver.getsockname())
            until_ns = time.monotonic_ns()
            sender.sendto(b"afterwards", receiver.getsockname())
        port = receiver.getsockname()[1]
    told = []
    for event in engine.finish(until_ns):
        if isinstance(event, ProcessEvent):
            continue
        assert isinstance(event, Batch)
        account.add(event.head, event.records)
        account.deliver(event.records["how"])
        told += event.records[event.records["dport"] == port]["len"].tolist()
    account.close(engine.closing)
    assert account.closes(), account.as_dict()
    assert not sum(account.lost.values())
    assert told == [28 + len(b"before")] * 2  # sent and received


def test_a_killed_reader_leaves_nothing_attached(engine: Engine) -> None:
    before = _programs()
    script = (
        "import time; from nlproto.engines.engine import open_engine\n"
        "with open_engine('ebpf', print): print('open', flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        while b"open" not in child.stdout.readline():
            pass
        assert _programs() > before
        child.send_signal(signal.SIGKILL)
    until(lambda: _programs() <= before)


def _programs() -> int:
    """Links of all processes."""
    count = 0
    for fdinfo in _bpf_links():
        count += "link_type" in fdinfo
    return count


def _bpf_links() -> Iterator[str]:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            for fd in os.listdir(f"/proc/{pid}/fdinfo"):
                with open(f"/proc/{pid}/fdinfo/{fd}") as file:
                    yield file.read()
        except OSError:
            continue


def test_a_process_that_is_gone_keeps_its_program_and_parent(engine: Engine) -> None:
    send = "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))"
    fork = f"import os; os.fork() and os.wait() or exec({send!r})"
    pids = []
    for script in (send, fork):
        child = subprocess.Popen([sys.executable, "-I", "-S", "-c", script])
        assert child.wait() == 0
        pids.append(child.pid)
    events = [e for e in (*engine.read(0.1), *engine.finish()) if isinstance(e, ProcessEvent)]
    seen = {e.tgid: e for e in events if e.event == lib.SNIFFER_EVENT_SEEN}
    child_seen = seen[pids[0]]
    grandchild = next(e for e in seen.values() if e.ppid == pids[1])
    assert child_seen.ppid == os.getpid()
    assert [pid for pid, _ in child_seen.parents[:1]] == [os.getpid()]
    assert [pid for pid, _ in grandchild.parents[:2]] == [pids[1], os.getpid()]
    assert grandchild.parents[0][1] == os.path.basename(sys.executable)[:15]
    for one, script in ((child_seen, send), (grandchild, fork)):
        words = [sys.executable, "-I", "-S", "-c", script]
        assert one.args == b"".join(word.encode() + b"\0" for word in words)
        assert one.args_len == len(one.args)
        assert one.exe == os.path.realpath(sys.executable)
        assert one.comm == os.path.basename(sys.executable)[:15]
        assert (one.uid, one.ns_tgid) == (0, one.tgid)
        assert one.pidns == os.stat("/proc/self/ns/pid").st_ino
    ended = {e.tgid: e for e in events if e.event == lib.SNIFFER_EVENT_EXIT}
    assert ended[child_seen.tgid].time_ns > child_seen.time_ns


def test_news_of_processes_that_are_lost_are_counted(engine: Engine) -> None:
    processes = 2300  # each is reported twice, and the ring holds 4,096
    script = f"""
import os, socket
for _ in range({processes}):
    pid = os.fork()
    if not pid:
        socket.socket(type=socket.SOCK_DGRAM)
        os._exit(0)
    os.waitpid(pid, 0)
"""
    subprocess.run([sys.executable, "-I", "-S", "-c", script], check=True)
    lost = engine.stats()["events_lost"]
    assert isinstance(lost, int)
    assert lost >= 2 * processes - 4096


def test_the_verifier_has_little_to_do(engine: Engine) -> None:
    assert 10_000 < stand_in(engine.stats())["verified_instructions"] < 400_000  # some 0.4 s


@pytest.fixture(scope="module")
def runs_here() -> None:
    try:
        why_in_parts()
    except NoBpf as error:
        skip_unless_installed(error)


@pytest.mark.usefixtures("runs_here")
@pytest.mark.parametrize("left_out", ["", "bpf", "perfmon", "net_admin"])
def test_three_capabilities_suffice_and_each_is_needed(left_out: str) -> None:
    held = [one for one in ("bpf", "perfmon", "net_admin") if one != left_out]
    wanted = ",".join(["-all", *(f"+{one}" for one in held)])
    command = ["setpriv", "--reuid=65534", "--clear-groups", f"--inh-caps={wanted}"]
    command += [f"--ambient-caps={wanted}", f"--bounding-set={wanted}"]
    done = subprocess.run([*command, *TRY], capture_output=True, text=True)
    expected = f"it needs CAP_{left_out.upper()}" if left_out else "it runs"
    assert expected in done.stdout, done.stdout + done.stderr


@pytest.mark.usefixtures("runs_here")
def test_the_root_cgroup_need_not_be_mounted() -> None:
    hidden = ["unshare", "--mount", "sh", "-c", 'umount -a -t cgroup2; exec "$@"', "sh"]
    done = subprocess.run([*hidden, *TRY], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "it runs", done.stdout + done.stderr
    # a user who may not mount it reads what to do, and nothing before that
    held = "-all,+bpf,+perfmon,+net_admin"
    command = ["setpriv", f"--inh-caps={held}", f"--bounding-set={held}", *TRY]
    done = subprocess.run([*hidden, *command], capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1, done.stdout + done.stderr
    assert "mount -t cgroup2" in done.stdout


def test_a_kernel_that_does_not_describe_itself_is_told() -> None:
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /sys/kernel/btf; exec "$@"']
    done = subprocess.run([*hidden, "sh", *TRY], capture_output=True, text=True)
    assert "no CONFIG_DEBUG_INFO_BTF" in done.stdout, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_sweeps_are_rare_while_little_happens_and_all_have_room(engine: Engine) -> None:
    """As if the last one had taken 50 ms and was five seconds ago."""
    one = stand_in(engine)
    for records, full, due in ((0, 0, False), (5000, 0, True), (0, 1, True)):
        counters = one._counters
        seq, no_room = int(counters["seq"].sum()), int(counters["full"].sum())
        last = _Sweep(time.monotonic() - 5, 0.05, seq - records, no_room - full)
        one._swept, one._look_again = last, 0.0
        list(engine.read(0))
        assert (one._swept is not last) == due
