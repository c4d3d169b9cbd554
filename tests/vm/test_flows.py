# SPDX-License-Identifier: MIT
"""Group flows: the same packets as group packets, to the packet and byte, summed up."""

from __future__ import annotations

import functools
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import configure

from nlproto.engines.module import ModuleEngine
from nlproto.kernel.netlink import FLOWS, PACKETS, Listener, Sniffer
from nlproto.pipeline.account import Account
from nlproto.records import wire
from nlproto.records.wire import Batch, FlowBatch, lib
from waiting import until

pytestmark = pytest.mark.usefixtures("loopback_is_up")
KEY = (
    *("cookie", "inode", "start_ns", "tgid", "uid", "creator", "netns", "ifindex", "sport"),
    *("dport", "family", "proto", "dir", "how", "flags", "saddr", "daddr", "comm"),
)
"""What a flow record keeps apart."""
CLIENT = """
import os, socket, sys
kind, host, port, count, size = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
family = socket.AF_INET6 if ":" in host else socket.AF_INET
if kind == "udp":
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.connect((host, port))
    for n in range(count):
        sock.send(b"x" * (1 + n * 37 % size))
        if n == count // 2 and not os.fork():  # the socket gets another owner
            for _ in range(count):
                sock.send(b"child")
            os._exit(0)
    os.wait()
else:
    for _ in range(count):
        with socket.create_connection((host, port)) as sock:
            sock.sendall(b"x" * size)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass
"""


@pytest.fixture
def servers() -> Iterator[dict[tuple[str, str], int]]:
    """(protocol, address) -> port of a server in this process; TCP echoes."""
    sockets: list[socket.socket] = []
    ports: dict[tuple[str, str], int] = {}
    threads = []
    for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        udp = socket.socket(family, socket.SOCK_DGRAM)
        udp.bind((host, 0))
        tcp = socket.create_server((host, 0), family=family, backlog=64)
        ports["udp", host], ports["tcp", host] = udp.getsockname()[1], tcp.getsockname()[1]
        threads.append(threading.Thread(target=_echo, args=(tcp,), daemon=True))
        threads[-1].start()
        sockets += [udp, tcp]
    yield ports
    for sock in sockets:
        if sock.type == socket.SOCK_STREAM:
            sock.shutdown(socket.SHUT_RDWR)  # ends accept()
    for thread in threads:
        thread.join()
    for sock in sockets:
        sock.close()


def _echo(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            while data := connection.recv(65536):
                connection.sendall(data)


def traffic(servers: dict[tuple[str, str], int], times: int = 1) -> None:
    """UDP and TCP by several processes at once; a socket each that changes its owner."""
    clients = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", CLIENT, kind, host, str(port)]
            + (["100", "900"] if kind == "udp" else ["5", "300000"])
        )
        for (kind, host), port in servers.items()
        for _ in range(times)
    ]
    assert [client.wait() for client in clients] == [0] * len(clients)


Sums = dict[bytes, tuple[int, ...]]


def packets_of(records: np.ndarray, sums: Sums) -> None:
    """Add to (records, packets, bytes, first, last, TCP flags) of each flow."""
    segments = records["gso_segs"].astype(np.int64)
    size = records["len"].astype(np.int64) + (segments - 1) * records["hdr_len"]
    for n, record in enumerate(records):
        key = b"".join(record[name].tobytes() for name in KEY)
        when, bits = int(record["time_ns"]), int(record["tcp_flags"])
        _add(sums, key, 1, int(segments[n]), int(size[n]), when, when, bits)


def flows_of(flows: np.ndarray, sums: Sums) -> None:
    for flow in flows:
        last = flow["last"]
        key = b"".join(last[name].tobytes() for name in KEY)
        _add(
            sums, key, int(flow["records"]), int(last["gso_segs"]), int(last["len"]),
            int(flow["first_ns"]), int(last["time_ns"]), int(last["tcp_flags"]),
        )  # fmt: skip


def _add(sums: Sums, key: bytes, *more: int) -> None:
    a, b = sums.get(key), more
    if a is not None:
        b = (*(x + y for x, y in zip(a[:3], b[:3], strict=True)),
             min(a[3], b[3]), max(a[4], b[4]), a[5] | b[5])  # fmt: skip
    sums[key] = b


def ends_of(tails: np.ndarray) -> dict[int, int]:
    return {int(tail["cpu"]): int(tail["record_seq"]) for tail in tails}


def test_flows_are_what_packets_are_to_the_packet_and_byte(
    loaded: None, servers: dict[tuple[str, str], int]
) -> None:
    one: Sums = {}
    summed: Sums = {}
    messages, spans = 0, []
    with Sniffer() as sniffer, Listener((PACKETS, FLOWS), receive_bytes=64 << 20) as listener:
        begin = ends_of(sniffer.flush())
        group = ("239.1.2.3", servers["udp", "127.0.0.1"])
        with multicast(group) as sender:
            sender.sendto(b"several receivers", group)
        traffic(servers)
        tails = sniffer.flush_flows()
        assert ends_of(sniffer.flush()) == ends_of(tails["tail"])
        while (received := listener.recv(0)) is not None:
            command, payload = received
            batch: Batch | FlowBatch
            if command == lib.SNIFFER_CMD_PACKETS:
                batch = wire.decode_batch(payload)
                if int(batch.head["record_seq"]) >= begin[int(batch.head["cpu"])]:
                    packets_of(batch.records, one)
            elif command == lib.SNIFFER_CMD_FLOWS:
                batch = wire.decode_flows(payload)
                if int(batch.head["record_seq"]) >= begin[int(batch.head["cpu"])]:
                    flows_of(batch.flows, summed)
                    messages += len(batch.flows)
                    spans += (batch.flows["last"]["time_ns"] - batch.flows["first_ns"]).tolist()
    assert one == summed
    records = sum(found[0] for found in one.values())
    copies = [key for key, found in one.items() if _flags(key) & lib.SNIFFER_F_COPY]
    assert copies and sum(one[key][1] for key in copies) >= 1
    assert len({found[5] for found in one.values()}) > 1
    # they are summed up, but not over more than a flush interval
    assert messages < records / 2
    assert max(spans) < 1_000_000_000


def _flags(key: bytes) -> int:
    at = sum(wire.RECORD[name].itemsize for name in KEY[: KEY.index("flags")])
    return int(struct.unpack_from("=H", key, at)[0])


class multicast:
    """A sender, and two receivers of what it sends to a group."""

    def __init__(self, group: tuple[str, int]) -> None:
        self._sockets = []
        loopback = socket.inet_aton("127.0.0.1")
        for _ in range(2):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("239.1.2.3", group[1]))
            member = socket.inet_aton(group[0]) + loopback
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
            self._sockets.append(sock)
        self._sockets.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self._sockets[-1].setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, loopback)

    def __enter__(self) -> socket.socket:
        return self._sockets[-1]

    def __exit__(self, *_: object) -> None:
        for sock in self._sockets:
            sock.close()


def test_what_a_flows_reader_loses_is_counted_in_packets_and_bytes(
    loaded: None, servers: dict[tuple[str, str], int]
) -> None:
    every: Sums = {}
    got: Sums = {}
    account = Account()
    with (
        Sniffer() as sniffer,
        Listener((FLOWS,), receive_bytes=64 << 20) as whole,
        Listener((FLOWS,)) as starved,
    ):
        info = sniffer.info()
        with socket.socket(fileno=os.dup(starved.fileno())) as netlink:
            netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        configure(sniffer, flush_ms=1)
        opening = sniffer.flush_flows()
        begin = ends_of(opening["tail"])
        account.open(opening["tail"], int(info["instance"]), FLOWS)
        traffic(servers, 2)  # nobody reads
        closing = sniffer.flush_flows()
        configure(sniffer, flush_ms=int(info["flush_ms"]))
        for listener, sums in ((whole, every), (starved, got)):
            while (received := listener.recv(0)) is not None:
                assert received[0] == lib.SNIFFER_CMD_FLOWS
                batch = wire.decode_flows(received[1])
                if int(batch.head["record_seq"]) < begin[int(batch.head["cpu"])]:
                    continue
                flows_of(batch.flows, sums)
                if sums is got:
                    account.add(batch.head, None, batch.count, FLOWS)
                    account.deliver(batch.flows["last"]["how"], batch.flows["records"])
        account.close(closing["tail"], FLOWS)
    told = [sum(found[n] for found in every.values()) for n in range(3)]
    had = [sum(found[n] for found in got.values()) for n in range(3)]
    sent = [
        int(closing["tail"]["record_seq"].sum()) - int(opening["tail"]["record_seq"].sum()),
        int(closing["wire_packets"].sum()) - int(opening["wire_packets"].sum()),
        int(closing["wire_bytes"].sum()) - int(opening["wire_bytes"].sum()),
    ]
    assert told == sent
    lost = [a - b for a, b in zip(sent, had, strict=True)]
    assert all(number > 0 for number in lost)
    assert account.records == sent[0]
    assert account.lost["socket"] == lost[0]
    assert account.closes()


def test_each_group_gets_records_only_while_somebody_listens_to_it(
    loaded: None, servers: dict[tuple[str, str], int]
) -> None:
    with Sniffer() as sniffer:

        def grown(name: str, groups: tuple[str, ...]) -> int:
            with Listener(groups):
                sniffer.flush()
                before = int(sniffer.counters()[name])
                traffic(servers)
                sniffer.flush()
                return int(sniffer.counters()[name]) - before

        assert grown("flow_records", (PACKETS,)) == 0
        assert grown("only_flows", (PACKETS,)) == 0
        assert grown("flow_records", (FLOWS,)) > 500
        assert grown("only_flows", (FLOWS,)) > 500
        assert grown("sent", (FLOWS,)) == 0
        assert grown("sent", (PACKETS, FLOWS)) > 500
        sniffer.flush()
        count = sniffer.counters()
    assert int(count["records"]) == int(count["by_how"].sum())
    assert int(count["records"]) == int(
        count["sent"] + count["lost_alloc"] + count["lost_batch"] + count["only_flows"]
    )
    assert int(count["flow_records"]) == int(count["flow_sent"] + count["flow_lost"])


def test_a_flood_of_flows_is_told_whole(loaded: None) -> None:
    """More flows than a message holds."""
    sums: Sums = {}
    with ModuleEngine((FLOWS,)) as engine:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for n in range(3000):
                sender.sendto(b"x" * (n % 7), ("127.0.0.1", 10000 + n % 300))
        for event in engine.finish():
            assert isinstance(event, FlowBatch)
            flows_of(event.flows, sums)
        sent = int(engine.closing["record_seq"].sum()) - int(engine.opening["record_seq"].sum())
    assert sum(found[0] for found in sums.values()) == sent >= 6000
    assert len(sums) >= 600


def _beyond(count: Callable[[], int], before: int) -> bool:
    return count() > before


def test_who_changes_groups_gets_each_record_once(loaded: None) -> None:
    """Packets, flows, packets and so on, while somebody sends."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        port = receiver.getsockname()[1]
        account = Account()
        seen = {Batch: 0, FlowBatch: 0}
        with ModuleEngine((PACKETS,)) as engine:
            account.open(engine.opening, engine.instance, engine.group)

            def take(event: object) -> None:
                if isinstance(event, Batch):
                    account.add(event.head, event.records)
                    account.deliver(event.records["how"])
                    seen[Batch] += _sent_to(event.records, port).size
                elif isinstance(event, FlowBatch):
                    account.add(event.head, None, event.count, FLOWS)
                    account.deliver(event.flows["last"]["how"], event.flows["records"])
                    to = _sent_to(event.flows["last"], port)
                    seen[FlowBatch] += int(event.flows["records"][to].sum())

            count, sender = sending(port)
            for n in range(20):
                before = dict(seen)
                kind = FlowBatch if n % 2 == 0 else Batch
                engine.want_packets(kind is Batch)
                account.go_over(engine.opening, engine.instance, engine.group)

                def read(kind: type = kind, before: dict[type, int] = before) -> bool:
                    for event in engine.read(0.1):
                        take(event)
                    return seen[kind] > before[kind]

                if n % 4:  # changes again before what was recorded is read
                    until(functools.partial(_beyond, count, count() + 10))
                else:
                    until(read)
            sent = sender()
            for event in engine.finish():
                take(event)
            account.close(engine.closing, engine.group)
    assert count() == sent
    assert seen[Batch] + seen[FlowBatch] == sent
    assert min(seen.values()) > 0
    assert sum(account.lost.values()) == 0
    assert account.closes()


def _sent_to(records: np.ndarray, port: int) -> np.ndarray:
    return np.flatnonzero((records["dport"] == port) & (records["dir"] == lib.SNIFFER_DIR_OUT))


def sending(port: int) -> tuple[Callable[[], int], Callable[[], int]]:
    """Two threads send on and on; how many datagrams until now, and an end to it (as many)."""
    ended = threading.Event()
    counts = [0, 0]

    def send(number: int) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            while not ended.is_set():
                sender.sendto(b"x", ("127.0.0.1", port))
                counts[number] += 1
                time.sleep(0.0005)

    threads = [threading.Thread(target=send, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()

    def end() -> int:
        ended.set()
        for thread in threads:
            thread.join()
        return sum(counts)

    return lambda: sum(counts), end


def test_an_unloaded_module_has_given_its_pages_back(module_file: Path, unloaded: None) -> None:
    """Readers that stopped reading keep what they have, and nothing else stays."""
    for _ in range(3):
        subprocess.run(["insmod", str(module_file)], check=True)
        with Listener((PACKETS, FLOWS)):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for _ in range(2000):
                    sender.sendto(b"x", ("127.0.0.1", 9))
            subprocess.run(["rmmod", "sniffer"], check=True)
