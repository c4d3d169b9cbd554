# SPDX-License-Identifier: MIT
"""Captures for other programs: pcapng and annotate against real tshark and tcpdump, Parquet, -C."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hunter.formats import pcapng
from hunter.show.columns import COLUMNS
from nlproto.client.client import DaemonClient
from nlproto.client.frames import MAX_WAITING
from talking import HUNTER, hunting, peers, stop, talk, tshark
from waiting import patient, there, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="engine packet needs root")
needs_tshark = pytest.mark.skipif(not shutil.which("tshark"), reason="tshark is not installed")
needs_tcpdump = pytest.mark.skipif(not shutil.which("tcpdump"), reason="tcpdump is not installed")


@pytest.fixture
def alone(tmp_path: Path) -> list[Any]:
    return ["--socket", tmp_path / "none", "--engine", "packet"]


@needs_tshark
@pytest.mark.parametrize("way", ["alone", "daemon", "direct"])
def test_tshark_reads_every_packet_and_its_owner_from_pcapng(
    way: str, alone: list[Any], daemon: Any, tmp_path: Path
) -> None:
    source = {
        "alone": alone,
        "daemon": ["--socket", daemon],
        "direct": ["--socket", daemon, "--direct", "--engine", "packet"],
    }[way]
    path = tmp_path / "x.pcapng"
    with peers() as (pid, tcp, udp):
        hunter = hunting(*source, "--save", path, "port", tcp, "or", udp)
        # the handshake, twice, and 4 packets a time over either
        talk(tcp, udp, seen=lambda: path.read_bytes().count(b"packet-hunter: ") >= 86)
        shown = int(there(re.search(r"(\d+) saved", stop(hunter)))[1])
    rows = tshark(
        path,
        *("frame.comment", "tcp.srcport", "tcp.dstport", "udp.srcport", "udp.dstport"),
        *("frame.interface_name", "ip.len", "ipv6.plen", "frame.packet_flags_direction"),
        *("_ws.malformed", "frame.len", "tcp.seq_raw", "tcp.payload", "udp.payload"),
    )
    assert len(rows) == shown > 60
    for comment, *ports, interface, ip4, ip6, way, malformed, length, seq, _, _ in rows:
        sport, dport = (int(port) for port in ports if port)
        # inbound is 1: the owner is that of the destination
        own = dport if way in ("1", "0x00000001") else sport
        owner = pid if own in (tcp, udp) else os.getpid()
        named = rf"packet-hunter: \S+\.{owner} uid=0 .*how=(diag|listener)"
        assert re.match(named, comment), comment
        assert "made from the record" not in comment
        assert interface == "lo" and not malformed and seq != "0"
        assert int(length) == (int(ip4) if ip4 else int(ip6) + 40)
    assert {row[6] for row in rows if row[6]} >= {"102"}  # 20 + 32 + 50
    payloads = {part for row in rows for part in row[-2:] if part}
    assert payloads == {b"x".hex() * 50, b"y".hex() * 30}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("daemon") / "d.sock"
    process = subprocess.Popen(
        [sys.executable, "-m", "daemon", "--engine", "packet", "--socket", path, "--foreground"],
        stderr=subprocess.DEVNULL,
    )
    until(lambda: process.poll() is not None or path.exists())
    yield path
    process.send_signal(signal.SIGTERM)
    assert process.wait(patient(20)) == 0


@needs_tshark
@needs_tcpdump
@pytest.mark.parametrize("interface", ["lo", "any"])
def test_annotate_names_the_packets_of_a_real_tcpdump(
    interface: str, daemon: Any, tmp_path: Path
) -> None:
    trace, named = tmp_path / "trace.pcap", tmp_path / "named.pcapng"
    with peers() as (pid, tcp, udp):
        dump = subprocess.Popen(
            [
                "tcpdump",
                "--immediate-mode",
                "-i",
                interface,
                "-U",
                "-w",
                trace,
                f"port {tcp} or port {udp}",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        while "listening on" not in (line := there(dump.stderr).readline()):
            assert line, "tcpdump ended at once"
        with DaemonClient(str(daemon)) as client:
            talk(tcp, udp, seen=lambda: len(client.who(port=udp)["flows"]) >= 2)
        dump.send_signal(signal.SIGINT)
        dump.communicate(timeout=patient(20))
    done = subprocess.run(
        [*HUNTER, "annotate", trace, "-o", named, "--socket", daemon],
        capture_output=True,
        text=True,
        timeout=patient(60),
    )
    assert done.returncode == 0, done.stderr
    before = tshark(trace, "frame.time_epoch", "frame.len", "tcp.seq_raw", "tcp.srcport")
    after = tshark(named, "frame.time_epoch", "frame.len", "tcp.seq_raw", "tcp.srcport")
    assert [[t[:17], *rest] for t, *rest in after] == [[t[:17], *rest] for t, *rest in before]
    rows = tshark(named, "frame.comment", "tcp.srcport", "udp.srcport")
    assert len(rows) > 30
    for comment, tcp_port, udp_port in rows:
        mine, theirs = os.getpid(), pid
        if int(tcp_port or udp_port) in (tcp, udp):
            mine, theirs = pid, os.getpid()
        assert re.search(rf"from \S+\.{mine} uid=0 .*to \S+\.{theirs} uid=0", comment), comment
    assert f".{pid} " in done.stdout and f"{len(rows)} packets" in done.stderr


def test_annotate_asks_for_more_flows_than_the_daemon_lets_wait(
    daemon: Any, tmp_path: Path
) -> None:
    trace = tmp_path / "many.pcap"
    data = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 101)
    for flow in range(3 * MAX_WAITING):
        udp = struct.pack("!HHHH", 1000 + flow, 9, 8, 0)
        ends = socket.inet_aton("192.0.2.1") + socket.inet_aton("192.0.2.2")
        packet = struct.pack("!BBHHHBBH", 0x45, 0, 28, 0, 0, 64, 17, 0) + ends + udp
        data += struct.pack("=IIII", 0, 0, len(packet), len(packet)) + packet
    trace.write_bytes(data)
    done = subprocess.run(
        [*HUNTER, "annotate", trace, "-o", tmp_path / "out.pcapng", "--socket", daemon],
        capture_output=True,
        text=True,
        timeout=patient(60),
    )
    assert done.returncode == 0, done.stderr
    assert f"{3 * MAX_WAITING} of them TCP or UDP" in done.stderr


def test_annotate_refuses_what_is_no_capture(daemon: Any, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no capture at all, but long enough for a header")
    done = subprocess.run(
        [*HUNTER, "annotate", tmp_path / "x", "-o", tmp_path / "y", "--socket", daemon],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "neither pcap nor pcapng" in done.stderr and not (tmp_path / "y").exists()


def test_first_bytes_are_not_for_users_without_rights(daemon: Any, tmp_path: Path) -> None:
    """What a process sends is for those who could capture it themselves."""
    script = (
        "import sys; from nlproto.client.client import DaemonClient\n"
        "print(DaemonClient(sys.argv[1]).start('', first_bytes=True)['snaps'])"
    )
    os.chmod(daemon.parent, 0o755)
    # as nobody, who may still read this Python wherever it is installed
    user = "setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all,+dac_read_search"
    caps = "--ambient-caps=+dac_read_search --bounding-set=-all,+dac_read_search"
    command = [*user.split(), *caps.split(), sys.executable, "-c", script, daemon]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_parquet_holds_what_json_lines_hold(alone: list[Any], tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    with peers() as (_, tcp, udp):
        both = [hunting(*alone, "--save", tmp_path / "x.parquet", "port", tcp)]
        talk(tcp, udp)
        shown = int(there(re.search(r"(\d+) saved", stop(both[0])))[1])
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table.num_rows == shown > 30
    # As on a system without the package tzdata.
    again = subprocess.run(
        [*HUNTER, "-r", tmp_path / "x.parquet", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONTZPATH": ""},
    )
    assert again.returncode == 0, again.stderr
    rows = [json.loads(line) for line in again.stdout.splitlines()]
    assert len(rows) == shown
    for ours, theirs in zip(rows, table.to_pylist(), strict=True):
        moment = theirs.pop("time").strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        assert ours == {"time": moment} | theirs


def test_rotation_keeps_whole_files_of_the_size(alone: list[Any], tmp_path: Path) -> None:
    with peers() as (_, tcp, udp):
        hunter = hunting(*alone, "--save", tmp_path / "x.csv", "-C", "4k", "-W", "3", "port", tcp)
        talk(tcp, udp, times=150, pause=0.02)
        stop(hunter)
    files = sorted(tmp_path.glob("x*.csv"))
    assert [file.name for file in files] == ["x0.csv", "x1.csv", "x2.csv"]
    for file in files:
        lines = file.read_text().splitlines()
        assert lines[0].startswith("time,dir,") and len(lines) > 1
        assert all(len(row) == len(COLUMNS) for row in csv.reader(lines))


def test_the_summary_counts_packets_bytes_and_far_ends(alone: list[Any], tmp_path: Path) -> None:
    with peers() as (pid, tcp, udp):
        path = tmp_path / "x.jsonl"
        hunter = hunting(*alone, "--save", path, "--summary", "port", tcp, "or", udp)
        talk(tcp, udp)
        hunter.send_signal(signal.SIGINT)
        summary, told = hunter.communicate(timeout=30)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert hunter.returncode == 0 and " saved = " in told
    mine = [row for row in rows if row["pid"] == pid]
    size = sum(row["len"] for row in mine)
    wanted = rf"^ *{pid} +{len(mine)} +{size:,} +2 +\S+"
    assert re.search(wanted, summary, re.MULTILINE), summary


def ethernet(payload: Any, kind: int = 0x0800) -> bytes:
    return bytes(12 * b"\0" + struct.pack("!H", kind) + payload)


def datagram(sport: int, dport: int) -> Any:
    ends = socket.inet_aton("127.0.0.1") * 2
    head = struct.pack("!BBHHHBBH", 0x45, 0, 28, 0, 0, 64, 17, 0) + ends
    return head + struct.pack("!HHHH", sport, dport, 8, 0)


def pcap(packets: Any, linktype: int = 1, now: float = 0.0) -> Any:
    data = struct.pack("=IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, linktype)
    for packet in packets:
        size = len(packet)
        data += struct.pack("=IIII", int(now), int(now % 1 * 1e6), size, size) + packet
    return data


@pytest.fixture(scope="module")
def talked(daemon: Any) -> Iterator[tuple[Any, ...]]:
    """Ports of a flow that the daemon has named, and its time."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", 0))
            ports = other.getsockname()[1], one.getsockname()[1]
            until = time.monotonic() + 60
            while "python" not in str(who(daemon, ports[0])):
                moment = time.time()
                other.sendto(b"x", one.getsockname())
                one.recv(10)
                assert time.monotonic() < until
                time.sleep(0.1)
            yield *ports, moment


def who(daemon: Any, port: int) -> Any:
    words = ["who", "--socket", daemon, "--port", str(port), "--json", "--since", "1m"]
    done = subprocess.run([*HUNTER, *words], capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout)["flows"]


def annotate(daemon: Any, *words: Any, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*HUNTER, "annotate", "--socket", daemon, *words],
        capture_output=True,
        timeout=60,
        **options,
    )


def comments(path: Any) -> Any:
    return path.read_bytes().count(b"packet-hunter: from ")


def test_annotate_reads_pipes_gzip_and_cut_captures_and_writes_into_pipes(
    daemon: Any, talked: tuple[Any, ...], tmp_path: Path
) -> None:
    packet = ethernet(datagram(*talked[:2]))
    data, out = pcap([packet] * 5000, now=talked[2]), tmp_path / "out.pcapng"
    packed = [gzip.compress(data), lzma.compress(data)]
    for source, given in (("-", data), ("/dev/stdin", data), *[("-", one) for one in packed]):
        done = annotate(daemon, source, "-o", out, input=given)
        assert done.returncode == 0 and comments(out) == 5000, done.stderr
        assert b"5,000 packets" in done.stderr and b"python" in done.stdout
    done = annotate(daemon, "-", "-o", out, input=data[:-10])
    assert done.returncode == 1 and comments(out) == 4999
    assert b"ends in the middle of a packet, at byte" in done.stderr
    assert b"4,999 packets" in done.stderr
    done = annotate(daemon, "-", "-o", "-", input=data)
    assert done.returncode == 0 and done.stdout[:4] == b"\n\r\r\n"
    assert done.stdout.count(b"packet-hunter: from ") == 5000 and b"python" in done.stderr
    assert len(list(pcapng.blocks(io.BytesIO(done.stdout), "x"))) == 5002


def test_annotate_tells_by_kind_what_it_did_not_look_into(
    daemon: Any, talked: tuple[Any, ...], tmp_path: Path
) -> None:
    flow, now = datagram(*talked[:2]), talked[2]
    odd = [
        *[ethernet(bytes(40), 0x0806)] * 3,
        *[ethernet(bytes(40), 0x8863)] * 2,
        ethernet(flow[:9] + b"\x84" + flow[10:]),
        ethernet(flow[:22]),
    ]
    done = annotate(daemon, "-", "-o", tmp_path / "o", input=pcap([ethernet(flow), *odd], now=now))
    assert b"8 packets, 1 of them TCP or UDP with ports: 1 named (100.0 %)" in done.stderr
    assert b"not looked into: ARP: 3, PPPoE discovery: 2, SCTP: 1, cut short: 1\n" in done.stderr
    done = annotate(daemon, "-", "-o", tmp_path / "o", input=pcap([bytes(60)] * 209, 227))
    assert b"not looked into: link type 227 (CAN): 209\n" in done.stderr
    # of tunnels the inner packet is named
    tunnel = flow[:2] + struct.pack("!H", len(flow) + 24) + flow[4:9] + b"\x2f" + flow[10:20]
    carried = [ethernet(tunnel + b"\0\0\x08\0" + flow)] * 3
    done = annotate(daemon, "-", "-o", tmp_path / "o", input=pcap(carried, now=now))
    assert comments(tmp_path / "o") == 3 and b"not looked" not in done.stderr
    # Linux cooked, with the tag of a VLAN
    cooked = bytes(14) + b"\x81\x00\x00\x07\x08\x00" + flow
    done = annotate(daemon, "-", "-o", tmp_path / "o", input=pcap([cooked] * 3, 113, now))
    assert comments(tmp_path / "o") == 3 and b"not looked" not in done.stderr


def test_annotate_marks_obsolete_blocks_and_counts_those_without_a_place(
    daemon: Any, talked: tuple[Any, ...], tmp_path: Path
) -> None:
    flow, out = ethernet(datagram(*talked[:2])), tmp_path / "o"
    head = pcapng.section_header("x") + pcapng.interface_description("lo", 1)
    stamp = int(talked[2] * 1e9)
    old = struct.pack("<HHIIII", 0, 0, stamp >> 32, stamp & 0xFFFFFFFF, len(flow), len(flow))
    old = pcapng._block(pcapng.OBSOLETE, old + pcapng._pad(flow))
    simple = pcapng._block(pcapng.SIMPLE, struct.pack("<I", len(flow)) + pcapng._pad(flow))
    done = annotate(daemon, "-", "-o", out, input=head + old * 3)
    assert done.returncode == 0 and comments(out) == 3, done.stderr
    done = annotate(daemon, "-", "-o", out, input=head + simple * 4)
    assert comments(out) == 0 and b"4 named" in done.stderr
    assert b"4 of the named are in simple packet blocks" in done.stderr


def test_annotate_keeps_the_owners_of_a_saved_capture(
    daemon: Any, alone: list[Any], tmp_path: Path
) -> None:
    saved, again = tmp_path / "x.pcapng", tmp_path / "y.pcapng"
    with peers() as (_, tcp, udp):
        hunter = hunting(*alone, "--save", saved, "port", tcp)
        talk(tcp, udp, seen=lambda: saved.read_bytes().count(b"packet-hunter: ") >= 40)
        told = stop(hunter)
    assert f"{saved} has each packet of lo twice" in told
    count = int(there(re.search(r"(\d+) saved", told))[1])
    done = annotate(daemon, saved, "-o", again)
    assert f"{count} packets, {count} of them TCP or UDP with ports: {count} named".encode() in (
        done.stderr
    )
    assert saved.read_bytes() == again.read_bytes()
    shown = [
        subprocess.run([*HUNTER, "-n", "-vv", "-r", path], capture_output=True).stdout
        for path in (saved, again)
    ]
    assert shown[0] == shown[1] and shown[0].count(b"\n") == count


@pytest.mark.parametrize("name", ["x.pcap", "x.cap", "X.PCAP"])
def test_annotate_writes_no_pcapng_under_the_name_of_pcap(
    name: str, daemon: Any, tmp_path: Path
) -> None:
    done = annotate(daemon, "-", "-o", tmp_path / name, input=pcap([]))
    assert done.returncode == 2 and not (tmp_path / name).exists()
    assert done.stderr.count(b"\n") == 1 and b".pcapng" in done.stderr


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "ecs.jsonl", "parquet", "pcapng"])
def test_a_file_gives_the_figures_of_the_live_run(
    suffix: str, alone: list[Any], tmp_path: Path
) -> None:
    """What is saved and shown at once, to the last word of -vv, and the table of processes."""
    if suffix == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path, lines = tmp_path / f"x.{suffix}", tmp_path / "lines"
    with peers() as (_, tcp, udp), lines.open("w") as out:
        process = subprocess.Popen(
            [*HUNTER, *map(str, alone), "--save", str(path), "--print", "-n", "-vv", "--summary"]
            + ["port", str(tcp), "or", str(udp)],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
        )
        while "Ctrl-C ends" not in (line := there(process.stderr).readline()):
            assert line
        talk(tcp, udp, seen=lambda: lines.read_text().count("\n") >= 80)
        told = stop(process)
    again = subprocess.run(
        [*HUNTER, "-r", path, "-n", "-vv", "--print", "--summary"], capture_output=True, text=True
    )
    assert sorted(again.stdout.splitlines()) == sorted(lines.read_text().splitlines())
    tables = [
        re.findall(r"^ *\d+ +[\d,]+ +[\d,]+ .*$", text, re.M) for text in (told, again.stderr)
    ]
    assert tables[0] and sorted(tables[0]) == sorted(tables[1])
    sums = [there(re.search(r"\d+ shown = .*", text))[0] for text in (told, again.stderr)]
    assert sums[0] == sums[1]


@needs_tshark
def test_a_saved_capture_says_where_it_cut(alone: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    with peers() as (_, tcp, udp):
        hunter = hunting(*alone, "--save", path, "-Q", "in", "port", tcp)
        talk(tcp, udp, seen=lambda: path.read_bytes().count(b"packet-hunter: ") >= 20)
        assert "twice" not in stop(hunter)
    done = subprocess.run(["capinfos", "-I", path], capture_output=True, text=True, check=True)
    assert "Capture length = 128" in done.stdout, done.stdout
    rows = tshark(
        path, "frame.cap_len", "tcp.analysis.retransmission", "tcp.analysis.duplicate_ack"
    )
    assert all(int(size) > 40 and not again and not ack for size, again, ack in rows)
