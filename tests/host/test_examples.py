# SPDX-License-Identifier: MIT
"""The scripts of examples/ as a reader of them would start them, beside a daemon."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from waiting import patient, until

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="engine packet needs root")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Iterator[str]:
    """The socket of a daemon."""
    path, log = tmp_path / "daemon.sock", tmp_path / "log"
    command = [sys.executable, "-m", "daemon", "--engine", "packet", "--foreground"]
    with open(log, "wb") as output:
        daemon = subprocess.Popen([*command, "--socket", path], stderr=output)
    try:
        until(lambda: "serving" in log.read_text() or daemon.poll() is not None, 60, str(log))
        yield str(path)
    finally:
        daemon.terminate()
        daemon.wait(patient(30))


@pytest.fixture(name="sender")
def _sender() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.bind(("127.0.0.1", 0))
        yield sender


def start(name: str, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_packets_are_printed_with_their_owner(path: str, sender: socket.socket) -> None:
    port = sender.getsockname()[1]
    lines: list[str] = []
    with start("print_packets.py", "--socket", path, f"udp src port {port}") as example:
        assert example.stdout is not None
        os.set_blocking(example.stdout.fileno(), False)

        def printed() -> bool:
            sender.sendto(b"x" * 10, ("127.0.0.1", port))
            lines.extend(example.stdout or ())
            return len(lines) > 2

        until(printed, 60, "three lines")
        example.kill()
    owner = rf"\d\d:\d\d:\d\d\.\d+ \S+\.{os.getpid()} udp"
    assert re.match(rf"{owner} 127\.0\.0\.1\.{port} > 127\.0\.0\.1\.{port} len 38", lines[0])


def test_who_had_a_port_is_told(path: str, sender: socket.socket) -> None:
    port = sender.getsockname()[1]
    found = ""

    def told() -> bool:
        nonlocal found
        sender.sendto(b"x", ("127.0.0.1", port))
        with start("who_had_port.py", "--socket", path, port) as example:
            found = example.communicate(timeout=patient(60))[0]
        assert example.returncode == 0
        return "had  udp" in found and "has  udp" in found

    until(told, 60, "both kinds of lines")
    assert f".{os.getpid()}" in found and f"127.0.0.1.{port}" in found


@pytest.mark.parametrize("script", ["print_packets.py", "who_had_port.py"])
def test_a_name_with_control_characters_is_shown_harmless(script: str, path: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOSTILE], stdout=subprocess.PIPE, text=True
    ) as sender:
        assert sender.stdout is not None
        port = sender.stdout.readline().strip()
        asked = [] if script == "who_had_port.py" else ["port"]
        found = ""

        def shown() -> bool:
            nonlocal found
            with start(script, "--socket", path, *asked, port) as one:
                assert one.stdout is not None
                found += one.stdout.readline()
                one.kill()
            return "evil" in found

        until(shown, 60, "the name")
        sender.kill()
    assert r"evil\x1b[2J" in found and "\x1b" not in found


_HOSTILE = """
import socket, time
open("/proc/self/comm", "w").write("evil\x1b[2J")
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    one.bind(("127.0.0.1", 0))
    print(one.getsockname()[1], flush=True)
    while True:
        one.sendto(b"x", one.getsockname())
        time.sleep(0.05)
"""


def test_the_exporter_counts_the_bytes_of_a_program(path: str, sender: socket.socket) -> None:
    pytest.importorskip("prometheus_client")
    port = sender.getsockname()[1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        where = free.getsockname()[1]
    name = Path("/proc/self/comm").read_text().strip()

    def counted() -> bool:
        sender.sendto(b"x" * 100, ("127.0.0.1", port))
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{where}/metrics", timeout=10) as page:
                text = page.read().decode()
        except OSError:
            return False
        sent = re.search(rf'^program_sent_bytes_total{{program="{name}"}} (\S+)', text, re.M)
        return sent is not None and float(sent[1]) >= 128

    with start("prometheus_exporter.py", "--socket", path, "--port", where) as example:
        until(counted, 60, "a counter of this program")
        example.kill()
