# SPDX-License-Identifier: MIT
"""One user without rights does the worst to a daemon, on 63 connections; root goes on working.

    sudo .venv/bin/python tests/attack.py [SECONDS [WORDS OF THE DAEMON'S COMMAND ...]]

(`make attack`; a shorter one is among tests/host. The kinds of attack are in attacking.py.)

Root sends 3,000 packets a second over loopback, and asks. Prints how long root waited for
`hello`, `who` and `subscribe`, what was lost, and how long SIGTERM took. Exits with 1 if a bound
does not hold. Daemon, attacker and root have control groups as their service manager makes them
(slices.py). The daemon has its unit's memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nlproto.client.client import ClientEvent, DaemonClient, StreamBatch
from nlproto.errors import Error
from slices import Slices

RATE = 3000  # packets/s of root's
PREPARING = 12.0  # s that the attackers have before anything is measured

PASSED = 1.0  # s, p99 of what root waits
OBEYED = 5.0  # s until SIGTERM has ended the daemon
UNIT = Path(__file__).parents[1] / "systemd/packet-hunterd.service"


@contextlib.contextmanager
def attackers(path: str, uid: int, metrics: int, slices: Slices | None) -> Iterator[None]:
    with _delegated(uid) as cgroup:
        words = [sys.executable, str(Path(__file__).parent / "attacking.py"), path, str(uid)]
        words += [str(metrics), str(cgroup or "")]

        def enter() -> None:
            if slices is not None:
                slices.entering("user")()
            if cgroup is not None:
                (cgroup / "cgroup.procs").write_text(str(os.getpid()))

        # one session, as a login is: schedulers divide the CPUs among sessions
        all_of_them = subprocess.Popen(words, cwd="/", start_new_session=True, preexec_fn=enter)
        try:
            yield
        finally:
            os.killpg(all_of_them.pid, signal.SIGKILL)
            all_of_them.wait()


@contextlib.contextmanager
def _delegated(uid: int) -> Iterator[Path | None]:
    """A control group that the user may make others in, as each login has one; None: no place."""
    for mount in map(Path, ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")):
        if (mount / "cgroup.controllers").exists() and os.access(mount, os.W_OK):
            break
    else:
        yield None
        return
    top = mount / f"user-{uid}.slice"
    top.mkdir()
    for path in (top, top / "cgroup.procs"):
        os.chown(path, uid, uid)
    try:
        yield top
    finally:
        until = time.monotonic() + 30
        below = [one for one in top.rglob("*") if one.is_dir()]
        for folder in sorted(below, reverse=True) + [top]:
            while folder.exists() and time.monotonic() < until:
                with contextlib.suppress(OSError):
                    folder.rmdir()


# Root


@dataclass
class Found:
    """Seconds that root waited, and what became of its records."""

    waited: dict[str, list[float]] = field(
        default_factory=lambda: {"hello": [], "who": [], "subscribe": []}
    )
    failed: list[str] = field(default_factory=list)
    lost: dict[str, int] = field(default_factory=dict)
    sent: int = 0
    received: int = 0
    dropped: int = 0
    term: float = 0.0
    memory: int = 0
    """Most resident memory of the daemon, bytes."""
    stats: dict[str, Any] = field(default_factory=dict)
    ran: float = 0.0
    """CPUs that the daemon had while root asked."""
    kept_waiting: float = 0.0
    """How many of its threads were ready to run and had no CPU meanwhile."""

    def p99(self, name: str) -> float:
        values = sorted(self.waited[name])
        return values[min(len(values) - 1, int(len(values) * 0.99))] if values else float("inf")


class _Sender(threading.Thread):
    """RATE packets a second to a socket of our own."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.receiver.bind(("127.0.0.1", 0))
        self.port = self.receiver.getsockname()[1]
        self.sent = 0
        self.ended = threading.Event()

    def run(self) -> None:
        began = time.monotonic()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.connect(("127.0.0.1", self.port))
            while not self.ended.wait(0.01):
                due = int((time.monotonic() - began) * RATE) - self.sent
                for _ in range(due):
                    sender.send(b"x" * 100)
                self.sent += due


def measure(
    path: str,
    pid: int,
    seconds: float,
    uid: int,
    preparing: float = PREPARING,
    metrics: int = 0,
    slices: Slices | None = None,
) -> Found:
    """Attack the daemon at `path` for `seconds` s as `uid`, then end its process `pid`."""
    found, sender = Found(), _Sender()
    with DaemonClient(path, timeout=60) as watching:
        before = watching.stats()["account"]
        watching.start(f"udp dst port {sender.port} and outbound")
        sender.start()
        reader = threading.Thread(target=_read, args=(watching, sender, found), daemon=True)
        reader.start()
        with attackers(path, uid, metrics, slices):
            time.sleep(preparing)
            until = time.monotonic() + seconds
            ran_before, waited_before = _schedule(pid)
            askers = [
                threading.Thread(target=_ask, args=(path, what, found, until, sender.port))
                for what in found.waited
            ]
            for one in askers:
                one.start()
            for one in askers:
                one.join()
            ran, waited = _schedule(pid)
            took = time.monotonic() - until + seconds
            found.ran, found.kept_waiting = (
                (ran - ran_before) / took,
                (waited - waited_before) / took,
            )
            sender.ended.set()
            sender.join()
            reader.join(120)
            with DaemonClient(path, timeout=120) as client:
                found.stats = client.stats()
            account = found.stats["account"]
            for place, value in account["lost"].items():
                found.lost[place] = value - before["lost"].get(place, 0)
            found.memory = _peak(pid)
            found.term = _end(pid)
    return found


def _read(client: DaemonClient, sender: _Sender, found: Found) -> None:
    try:
        while not sender.ended.is_set():
            found.received += _records_in(client.read(0.1))
        sender.join()
        end = client.unsubscribe()
        found.received += _records_in(client.read(0))
        found.sent, found.dropped = sender.sent, end["dropped"]
    except Error as error:
        found.failed.append(f"watching: {error}")


def _records_in(events: Iterable[ClientEvent]) -> int:
    return sum(len(one.batch.records) for one in events if isinstance(one, StreamBatch))


def _ask(path: str, what: str, found: Found, until: float, port: int) -> None:
    asked: dict[str, Callable[[DaemonClient], object]] = {
        "hello": lambda client: None,
        "who": lambda client: client.who(port=port),
        "subscribe": lambda client: client.start("udp port 9"),
    }
    while time.monotonic() < until:
        began = time.monotonic()
        try:
            with DaemonClient(path, timeout=60) as client:
                if what != "hello":
                    began = time.monotonic()
                asked[what](client)
        except Error as error:
            found.failed.append(f"{what}: {error}")
        found.waited[what].append(time.monotonic() - began)
        time.sleep(0.05)


def _schedule(pid: int) -> tuple[float, float]:
    """Seconds that all threads of a process ran, and waited for a CPU (sched-stats.rst)."""
    ran = waited = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            one = (thread / "schedstat").read_text().split()
            ran, waited = ran + int(one[0]), waited + int(one[1])
    return ran / 1e9, waited / 1e9


def _peak(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().split("\n"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _end(pid: int) -> float:
    """Seconds that the process takes to end after SIGTERM; 60 at most."""
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    while time.monotonic() - began < 60 and _lives(pid):
        time.sleep(0.01)
    return time.monotonic() - began


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _config(directory: str, metrics: int) -> str:
    """All that a user's traffic can reach."""
    values = {"history": f"{directory}/history/history.db", "domains": "sni", "sha256": "on"}
    values["metrics"] = f"127.0.0.1:{metrics}"
    os.mkdir(f"{directory}/history")
    path = Path(directory, "daemon.yaml")
    path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    return str(path)


def _memory_of_the_unit() -> int:
    (line,) = (one for one in UNIT.read_text().split("\n") if one.startswith("MemoryMax="))
    assert line.endswith("G")
    return int(line.partition("=")[2][:-1]) << 30


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    command = sys.argv[2:] or [sys.executable, "-I", "-m", "daemon"]
    memory = _memory_of_the_unit()
    load = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory() as directory,
        Slices("user", "root", memory=memory) as slices,
        slices.inside("root"),
    ):
        os.chmod(directory, 0o755)
        path = f"{directory}/daemon.sock"
        log = open(f"{directory}/log", "w+")
        metrics = _free_port()
        command = [*command, "--engine", "packet", "--foreground", "--socket", path]
        command += ["--config", _config(directory, metrics)]
        daemon = subprocess.Popen(
            command,
            stderr=log,
            stdout=log,
            cwd="/",
            start_new_session=True,
            preexec_fn=slices.entering("system"),
        )
        try:
            until = time.monotonic() + 30
            while "serving" not in Path(log.name).read_text():
                if daemon.poll() is not None or time.monotonic() > until:
                    print(Path(log.name).read_text())
                    return 1
                time.sleep(0.05)
            uid = 60000 + os.getpid() % 5000
            found = measure(path, daemon.pid, seconds, uid, PREPARING, metrics, slices)
        finally:
            daemon.kill()
            daemon.wait()
        text = Path(log.name).read_text()
    apart = "apart" if slices.made else "not apart: no control groups here"
    print(f"load       {load:.1f} before; daemon, attacker and root are {apart}")
    return _tell(found, memory, text)


def _tell(found: Found, memory: int, log: str) -> int:
    for name, values in found.waited.items():
        most = max(values, default=0.0)
        print(
            f"{name:10} {len(values):4} times, p99 {found.p99(name) * 1000:8.1f} ms,"
            f" most {most * 1000:8.1f} ms"
        )
    print(f"records    {found.sent} sent, {found.received} received, {found.dropped} dropped")
    print(f"lost       {json.dumps(found.lost)}")
    bounds = found.stats.get("memory", {})
    print(f"memory     {found.memory >> 20} MiB at most; bounds {json.dumps(bounds)}")
    print(f"SIGTERM    obeyed after {found.term:.1f} s")
    print(f"daemon     ran {found.ran:.2f}, ready without a CPU {found.kept_waiting:.2f} threads")
    print(f"clients    {json.dumps(found.stats.get('clients'))}")
    for line in sorted(set(found.failed)):
        print(f"failed     {found.failed.count(line)} times: {line}")
    print(log[-3000:])
    broken = [f"p99 of {name}" for name in found.waited if found.p99(name) > PASSED]
    broken += [f"lost in {place}" for place, count in found.lost.items() if count]
    broken += ["dropped"] if found.dropped or found.received != found.sent else []
    broken += ["an answer"] if found.failed else []
    broken += ["SIGTERM"] if found.term > OBEYED else []
    broken += ["memory"] if found.memory > memory or bounds.get("together", 0) > memory else []
    broken += ["the log"] if "Traceback" in log or "does not close" in log else []
    print(f"broken     {', '.join(broken)}" if broken else "all bounds held")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
