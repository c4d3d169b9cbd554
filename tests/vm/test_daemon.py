# SPDX-License-Identifier: MIT
"""The daemon and the hunter on the real module: it is reloaded, floods, and the daemon dies."""

from __future__ import annotations

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nlproto.client.client import DaemonClient
from nlproto.errors import Error
from waiting import patient, until

KPROBES = Path("/proc/sys/kernel/ftrace_enabled")


@pytest.fixture(autouse=True)
def loopback_is_up() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


class Program:
    """A program of the tree's, and what it wrote on stderr."""

    def __init__(self, directory: Path, module: str, *arguments: str) -> None:
        self.log = directory / f"{module}.{time.monotonic_ns()}"
        with self.log.open("wb") as log:
            command = [sys.executable, "-I", "-m", module, *arguments]
            self.process = subprocess.Popen(command, stderr=log, stdout=log)

    def wait_for(self, text: str) -> None:
        until(lambda: text in self.text() or self._ended(), what=f"{text!r} in {self.log}")

    def _ended(self) -> bool:
        assert self.process.poll() is None, self.text()
        return False

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(patient(10))


@pytest.fixture
def start(tmp_path: Path, loaded: None) -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def start(module: str, *arguments: str) -> Program:
        options = ["--socket", str(tmp_path / "daemon.sock")]
        if module == "daemon":
            options += ["--foreground", "--config", str(tmp_path / "daemon.yaml")]
        programs.append(Program(tmp_path, module, *options, *arguments))
        if module == "daemon":
            programs[-1].wait_for("serving")
        return programs[-1]

    (tmp_path / "daemon.yaml").write_text("")
    yield start
    for program in programs:
        if program.process.poll() is None:
            program.process.kill()
            program.process.wait()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "daemon.sock")


def send(port: int, count: int = 1) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(count):
            sender.sendto(b"x", ("127.0.0.1", port))


@pytest.fixture
def receiver() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        yield receiver


def closing(text: str) -> dict[str, int]:
    """The hunter's closing account, checked to close."""
    found = re.search(r"(\d+) records = (\d+) delivered \+ (\d+) lost", text)
    shown = re.search(r"(\d+) (?:shown|saved) = ", text)
    gap = re.search(r"gap (\d+)", text)
    assert found and shown, text
    records, delivered, lost = (int(number) for number in found.groups())
    assert records == delivered + lost
    return {
        "delivered": delivered,
        "lost": lost,
        "shown": int(shown[1]),
        "gap": int(gap[1]) if gap else 0,
    }


@pytest.mark.patience(600)
def test_after_kill_9_owners_come_from_the_kernel_and_the_hunter_counts_the_gap_as_lost(
    start: Callable[..., Program], path: str, receiver: socket.socket
) -> None:
    port = receiver.getsockname()[1]
    first = start("daemon", "--engine", "module")
    hunter = start("hunter", "-n", "--duration", "500")
    hunter.wait_for("Ctrl-C ends")
    send(port, 20)
    # all of them, out and in: what the daemon has not handed on yet dies with it
    until(lambda: hunter.text().count(f".{port} len") == 40)
    first.end(signal.SIGKILL)
    hunter.wait_for("waiting for it to come back")
    send(port, 50)
    start("daemon", "--engine", "module")
    hunter.wait_for("the daemon is back after")
    with DaemonClient(path) as client:
        # it never sent: traffic alone would not tell
        (owner,) = until(lambda: client.owner(port, "udp")["owners"])
        assert owner["pid"] == os.getpid()
        assert client.stats()["processes"]["known"] > 0
    send(port, 20)
    # whose tail is asked for at the end
    assert hunter.end(signal.SIGINT) == 0
    account = closing(hunter.text())
    # 50 datagrams, out and in
    assert 100 <= account["gap"] <= account["lost"]
    assert account["shown"] >= 80


@pytest.mark.patience(600)
def test_a_module_that_is_unloaded_and_loaded_again_is_noticed_and_used_again(
    start: Callable[..., Program], path: str, receiver: socket.socket, module_file: Path
) -> None:
    port = receiver.getsockname()[1]
    daemon = start("daemon")
    hunter = start("hunter", "-n", "--duration", "500")
    hunter.wait_for("engine module")
    send(port)
    subprocess.run(["rmmod", "sniffer"], check=True)
    daemon.wait_for("engine module has gone: going on with engine packet")
    hunter.wait_for("going on with engine packet")
    with DaemonClient(path) as client:
        assert client.daemon["engine"] == "packet"
        client.start(f"udp dst port {port} and outbound")
        send(port, 5)
        assert client.unsubscribe()["sent"] == 5
        client.start(f"udp dst port {port} and outbound")
        subprocess.run(["insmod", str(module_file)], check=True)
        sent = 0
        while client.stats()["engine"] != "module":
            send(port)
            sent += 1
            time.sleep(0.05)
        daemon.wait_for("the module is loaded: records are exact now")
        hunter.wait_for("records are exact now")
        send(port, 5)
        end = client.unsubscribe()
    # none was told by neither, and by both at most what was sent while the module flushed: one,
    # or a few when all processors have other work
    assert sent + 5 <= end["sent"] <= sent + 8
    assert end["account"]["closes"]
    assert end["account"]["gap_ms"] > 0
    assert hunter.end(signal.SIGINT) == 0, hunter.text()
    assert "probes do not fire" not in hunter.text()
    closing(hunter.text())
    assert "nothing was recorded for" in hunter.text()
    assert daemon.end(signal.SIGTERM) == 0
    assert "does not close" not in daemon.text()


@pytest.mark.patience(600)
def test_a_flood_is_lost_at_the_right_place_within_the_limit_and_the_account_closes(
    start: Callable[..., Program], path: str, receiver: socket.socket, tmp_path: Path
) -> None:
    port = receiver.getsockname()[1]
    (tmp_path / "daemon.yaml").write_text("queue_size: 64KiB\n")
    daemon = start("daemon", "--engine", "module")
    with DaemonClient(path, timeout=patient(10)) as client:
        # what gathers while it stands still comes faster than it can be named. On one CPU its
        # threads may happen to take turns: then once more. Each packet is of a new socket, to
        # make naming slow.
        for _ in range(10):
            daemon.process.send_signal(signal.SIGSTOP)
            for _ in range(3000):
                send(port)
            daemon.process.send_signal(signal.SIGCONT)
            stats = until(lambda: at_rest(client))
            if stats["queue"]["dropped_records"]:
                break
        assert stats["queue"]["peak_bytes"] <= stats["queue"]["max_bytes"] == 64 << 10
        assert stats["account"]["lost"]["queue"] == stats["queue"]["dropped_records"] > 0
        client.start(f"udp dst port {port} and outbound")
        send(port, 10)
        end = client.unsubscribe()
    assert end["sent"] == 10
    assert end["account"]["closes"]
    assert daemon.end(signal.SIGTERM) == 0


@pytest.mark.patience(600)
def test_history_and_account_are_exact_while_clients_that_want_packets_come_and_go(
    start: Callable[..., Program], path: str, receiver: socket.socket
) -> None:
    port = receiver.getsockname()[1]
    start("daemon", "--engine", "module")
    ended = threading.Event()
    sent = 0

    def go_on() -> None:
        nonlocal sent
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            while not ended.is_set():
                sender.sendto(b"x" * (sent % 9), ("127.0.0.1", port))
                sent += 1
                time.sleep(0.002)

    def summed_up(client: DaemonClient) -> int:
        return int(client.stats()["engine_stats"]["only_flows"])

    def beyond(count: int) -> bool:
        return sent > count

    sender = threading.Thread(target=go_on)
    with DaemonClient(path, timeout=patient(10)) as asker:
        sender.start()
        before = until(lambda: summed_up(asker))
        shown = 0
        for _ in range(8):
            with DaemonClient(path, timeout=patient(10)) as client:
                client.start(f"udp dst port {port} and outbound")
                until(functools.partial(beyond, sent + 50))
                shown += int(client.unsubscribe()["sent"])
        # nobody wants packets: flows again
        now = summed_up(asker)
        until(lambda: summed_up(asker) > max(now, before) + 50)
        ended.set()
        sender.join()
        # the daemon may be behind: what the kernel has queued is in no figure yet
        figures = "packets_out", "packets_in", "bytes_out", "bytes_in"
        size = sum(28 + n % 9 for n in range(sent))
        right = [sent, sent, size, size]

        def sums() -> list[int]:
            flows = asker.request("history", port=port)["flows"]
            return [sum(flow[name] for flow in flows) for name in figures]

        until(lambda: sums() == right, what=f"a history of {right}")
        stats = until(lambda: at_rest(asker))
    assert 8 * 50 <= shown < sent
    assert sum(stats["account"]["lost"].values()) == 0
    assert stats["engine_stats"]["sent"] > 0


def at_rest(client: DaemonClient) -> dict[str, Any] | None:
    try:
        stats = client.stats()
    except Error:
        return None
    return stats if stats["account"]["closes"] else None


@pytest.mark.patience(600)
def test_probes_switched_off_after_load_are_told_in_one_line(
    start: Callable[..., Program], path: str
) -> None:
    try:
        KPROBES.write_text("0")
        KPROBES.write_text("1")
    except OSError as error:
        pytest.skip(f"this kernel does not let ftrace be switched off: {error}")
    daemon = start("daemon", "--engine", "module")
    try:
        KPROBES.write_text("0")
        daemon.wait_for("the kernel's probes do not fire")
        [line] = [line for line in daemon.text().splitlines() if "do not fire" in line]
        assert "kernel.ftrace_enabled=1" in line
    finally:
        KPROBES.write_text("1")
    daemon.wait_for("the kernel's probes fire again")
    with DaemonClient(path) as client:
        assert client.stats()["engine_stats"]["canary"] == 1
