# SPDX-License-Identifier: MIT
"""The hunter on the module: through the daemon, with --direct, alone; what it saves is true."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from nlproto.client.client import DaemonClient
from waiting import patient, until

HUNTER = [sys.executable, "-m", "hunter"]
WAYS = ("daemon", "direct", "alone")

# One connection and one datagram each way; both processes tell their pid and port themselves.
SERVER = """
import os, socket
tcp = socket.create_server(("127.0.0.1", 0))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.1", 0))
print(os.getpid(), tcp.getsockname()[1], udp.getsockname()[1], flush=True)
while True:
    peer, _ = tcp.accept()
    while data := peer.recv(100):
        peer.sendall(data)
    peer.close()
    data, sender = udp.recvfrom(100)
    udp.sendto(data, sender)
"""
CLIENT = """
import os, socket, sys
print("client", os.getpid(), file=sys.stderr, flush=True)
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as peer:
    for _ in range(5):
        peer.sendall(b"x" * 50)
        peer.recv(50, socket.MSG_WAITALL)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    udp.sendto(b"y" * 30, ("127.0.0.1", int(sys.argv[2])))
    udp.recv(100)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[int, int, int]]:
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        pid, tcp, udp = map(int, process.stdout.readline().split())
        yield pid, tcp, udp
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def daemon(module_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if not Path("/sys/module/sniffer").exists():
        subprocess.run(["insmod", module_file], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    path = tmp_path_factory.mktemp("daemon") / "d.sock"
    process = subprocess.Popen(
        [sys.executable, "-m", "daemon", "--engine", "module", "--socket", path, "--foreground"],
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: process.poll() is not None or path.exists())
    assert process.poll() is None, process.communicate()[1]
    yield path
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=patient(10))
    assert process.returncode == 0, log


def source(way: str, daemon: Path) -> list[str]:
    return {
        "daemon": ["--socket", str(daemon)],
        "direct": ["--socket", str(daemon), "--direct", "--engine", "module"],
        "alone": ["--socket", str(daemon.with_name("none")), "--engine", "module"],
    }[way]


def hunt(
    way: str,
    daemon: Path,
    server: tuple[int, int, int],
    *options: object,
    enter: Sequence[object] = (),
    least: int = 20,
) -> tuple[int, str]:
    """Run the hunter around the client; the client's pid and what the hunter said, checked.

    `enter`: the command that the client is started with; `least`: records that are shown.
    """
    _, tcp, udp = server
    done = subprocess.run(
        [*HUNTER, *source(way, daemon), *map(str, options), f"port {tcp} or port {udp}"]
        + ["--all", "--", *map(str, enter), sys.executable, "-c", CLIENT, str(tcp), str(udp)],
        capture_output=True,
        text=True,
        timeout=patient(20),
    )
    assert done.returncode == 0, done.stderr
    records = re.search(r"(\d+) records = (\d+) delivered \+ (\d+) lost", done.stderr)
    shown = re.search(r"(\d+) (?:shown|saved) = (\d+) named", done.stderr)
    assert records and shown, done.stderr
    assert int(records[1]) == int(records[2]) and records[3] == "0"
    assert int(records[2]) >= int(shown[1]) == int(shown[2]) > least, done.stderr
    client = re.search(r"client (\d+)", done.stderr)
    assert client
    return int(client[1]), done.stdout + done.stderr


# One run of the hunter a way: each is a minute of an emulated guest.
@pytest.mark.parametrize("way", WAYS)
def test_every_packet_has_its_process_first_bytes_and_comment(
    way: str, daemon: Path, server: tuple[int, int, int], tmp_path: Path
) -> None:
    pid, tcp, udp = server
    path = tmp_path / "x.pcapng"
    client, told = hunt(way, daemon, server, "--save", path, "--json")
    rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert int(re.search(r"(\d+) (?:shown|saved)", told)[1]) == len(rows)  # type: ignore[index]
    for row in rows:
        own = row["sport"] if row["dir"] == "out" else row["dport"]
        assert row["pid"] == (pid if own in (tcp, udp) else client), row
        assert row["exe"] == os.path.realpath(sys.executable), row
        assert row["how"] not in ("diag", "proc"), row
    assert {row["proto"] for row in rows} == {"tcp", "udp"}

    fields: tuple[str, ...] = ("frame.comment", "tcp.srcport", "tcp.dstport")
    fields += ("udp.srcport", "udp.dstport", "frame.packet_flags_direction")
    fields += ("frame.interface_name", "tcp.seq_raw")
    fields += ("tcp.payload", "udp.payload")
    done = subprocess.run(
        ["tshark", "-r", str(path), "-n", "-T", "fields", "-E", "separator=|"]
        + [part for field in fields for part in ("-e", field)],
        capture_output=True,
        text=True,
        check=True,
    )
    packets = [line.split("|") for line in done.stdout.splitlines()]
    assert len(packets) == len(rows)
    for comment, *ports, direction, interface, seq, _, _ in packets:
        ends = [int(port) for port in ports if port]
        own = ends[1] if direction in ("1", "0x00000001") else ends[0]
        owner = pid if own in (tcp, udp) else client
        assert re.match(rf"packet-hunter: \S+\.{owner} uid=0 ", comment), comment
        assert "made from the record" not in comment
        assert interface == "lo" and seq != "0"
    payloads = {part for packet in packets for part in packet[-2:] if part}
    assert payloads == {b"x".hex() * 50, b"y".hex() * 30}


def test_lines_summary_and_csv_have_the_owners(
    daemon: Path, server: tuple[int, int, int], tmp_path: Path
) -> None:
    pid, tcp, udp = server
    path = tmp_path / "x.csv"
    client, told = hunt("daemon", daemon, server, "-n", "--summary", "--save", path, "--print")
    assert re.search(rf" in  tcp 127\.0\.0\.1\.\d+ > 127\.0\.0\.1\.{tcp} len .* \S+\.{pid}\b", told)
    assert re.search(rf"^ +{client} ", told, re.MULTILINE), told  # the summary
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert int(re.search(r"(\d+) (?:shown|saved)", told)[1]) == len(rows)  # type: ignore[index]
    for row in rows:
        own = int(row["sport"] if row["dir"] == "out" else row["dport"])
        assert int(row["pid"]) == (pid if own in (tcp, udp) else client), row


def test_a_container_of_a_moment_is_found_by_its_id(
    daemon: Path, server: tuple[int, int, int], tmp_path: Path
) -> None:
    mount, identity = tmp_path / "cgroup", "4f1c0d2e9a3b" + "7" * 52
    mount.mkdir()
    subprocess.run(["mount", "-t", "cgroup2", "none", mount], check=True)
    try:
        cgroup = mount / f"docker-{identity}.scope"
        cgroup.mkdir()
        enter = ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', cgroup]
        options = ("--json", "--container", identity[:12])
        client, told = hunt("daemon", daemon, server, *options, enter=enter, least=10)
        rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
        assert {row["pid"] for row in rows} == {client}
        assert {row["dir"] for row in rows} == {"in", "out"}
        cgroup.rmdir()
    finally:
        subprocess.run(["umount", mount], check=True)


def test_annotate_names_a_real_tcpdump(
    daemon: Path, server: tuple[int, int, int], tmp_path: Path
) -> None:
    pid, tcp, udp = server
    trace, named = tmp_path / "x.pcap", tmp_path / "x.pcapng"
    dump = subprocess.Popen(
        ["tcpdump", "--immediate-mode", "-i", "lo", "-U", "-Z", "root", "-w", str(trace)]
        + [f"port {tcp} or port {udp}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert dump.stderr is not None
    while "listening on" not in (line := dump.stderr.readline()):
        assert line, "tcpdump ended at once"
    client = subprocess.run(
        [sys.executable, "-c", CLIENT, str(tcp), str(udp)],
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    other = int(client.stderr.split()[1])
    with DaemonClient(str(daemon), timeout=patient(10)) as asking:
        until(lambda: asking.who(pid=other)["flows"])
    dump.send_signal(signal.SIGINT)
    dump.communicate(timeout=patient(10))
    done = subprocess.run(
        [*HUNTER, "annotate", trace, "-o", named, "--socket", daemon],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    comments = re.findall(rb"packet-hunter: from [^\0]*", named.read_bytes())
    assert f"{len(comments)} packets" in done.stderr and "(100.0 %)" in done.stderr
    assert len(comments) >= 15
    for comment in comments:
        owners = re.findall(rb"(?:from|to) \S+\.(\d+) ", comment)
        assert sorted(map(int, owners)) == sorted((pid, other)), comment


@pytest.mark.parametrize("way", ["daemon", "alone"])
def test_of_a_command_every_descendant_is_shown_and_nobody_else(
    way: str, daemon: Path, server: tuple[int, int, int], tmp_path: Path
) -> None:
    """Each sends one datagram and is gone, as are the processes between it and the command."""
    _, _, udp = server
    pids = tmp_path / "pids"
    pids.touch()
    say = f"bash -c 'echo $$ >>{pids}; echo x >/dev/udp/127.0.0.1/{udp}'"
    lines = [
        f"{say}; true",
        f"( ( ( {say} & ) & ) & )",
        f'setsid -f sh -c "{say.replace("$$", chr(92) + "$$")}; true"',
        f'until [ "$(wc -l <{pids})" = 3 ]; do sleep 0.1; done; sleep 1; exit 9',
    ]
    done = subprocess.run(
        [
            *HUNTER,
            *source(way, daemon),
            "--json",
            f"port {udp}",
            "--",
            "sh",
            "-c",
            "\n".join(lines),
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 9, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["pid"] for row in rows} == set(map(int, pids.read_text().split())), done.stderr
    assert {row["dir"] for row in rows} == {"out"} and len(rows) == 3
    others = re.search(r"(\d+) not of the command = (\d+) named", done.stderr)
    assert others and others[1] == others[2], done.stderr
