# SPDX-License-Identifier: MIT
"""make soak: mixed load from 63 clients while the daemon, its engine and the clock change.

soak.py [SECONDS]             root (engines packet and ebpf); 600 s

The first third has restarts, by SIGTERM and SIGKILL. The last life is the longest: its memory must
be flat, and without clients it must have the descriptors and threads that it began with. Engines
take over from each other. The time of day jumps by twenty years either way. The configuration is
read again. Every subscription's account must close, and the daemon's. Exits with 1 if one does not.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from nlproto.client.client import DaemonClient
from nlproto.errors import Error

GROWTH = 1.10  # the last quarter may need so many times what the second quarter did
MORE = 4  # descriptors or threads that a pause of the machine may leave behind for a moment
CLIENTS, USERS = 42, 21
"""Clients of root's and of a user without rights: 63."""
APART = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]
APART += ["sh", "-c", 'ip link set lo up && exec "$@"', "apart"]
"""With SOAK_APART=1: apart from what else a crowded machine does. Engine ebpf cannot be so."""
YEARS = 20 * 31_556_952
USER = 60000 + os.getpid() % 5000
# Small tables: they are full early, and what grows afterwards is a leak.
CONFIG = """
history: {directory}/history.db
history_size: 4MiB
history_flows: 5000
max_processes: 500
max_ports: 2000
client_queue_size: 256KiB
queue_size: 4MiB
flush_interval: 200ms
"""
CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset(void)
{
	static volatile long *at;

	if (!at) {
		int fd = open(getenv("SOAK_CLOCK"), O_RDONLY);

		at = mmap(0, sizeof(*at), PROT_READ, MAP_SHARED, fd, 0);
		close(fd);
	}
	return *at;
}

int clock_gettime(clockid_t which, struct timespec *now)
{
	int result = syscall(SYS_clock_gettime, which, now);

	if (!result && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE))
		now->tv_sec += offset();
	return result;
}

int gettimeofday(struct timeval *now, void *zone)
{
	struct timespec found;
	int result = clock_gettime(CLOCK_REALTIME, &found);

	(void)zone;
	now->tv_sec = found.tv_sec;
	now->tv_usec = found.tv_nsec / 1000;
	return result;
}

time_t time(time_t *now)
{
	struct timespec found;

	clock_gettime(CLOCK_REALTIME, &found);
	if (now)
		*now = found.tv_sec;
	return found.tv_sec;
}
"""


def daemon(directory: str, arguments: list[str]) -> NoReturn:
    """The daemon, which changes to the engine that the file `engine` names."""
    import daemon.__main__
    from daemon.system.watcher import Watcher
    from nlproto.engines.engine import open_engine

    look = Watcher._look_for_module
    wish = Path(directory, "engine")

    def look_or_change(self: Watcher) -> None:
        wanted = wish.read_text()
        if wanted == self._pipeline.engine.name:
            look(self)
            return
        engine = open_engine(
            wanted, lambda _: None, ring_bytes=self._ring_bytes, holders=self._holders
        )
        self._change(engine, "soak", f"engine {wanted} takes over")

    setattr(Watcher, "_look_for_module", look_or_change)  # noqa: B010  # mypy knows methods
    sys.exit(daemon.__main__.main(arguments))


class Daemon:
    """The daemon under test, one life after another."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.path = f"{directory}/daemon.sock"
        self.log = Path(directory, "log")
        self.engine = "packet"
        self._clock = open(f"{directory}/clock", "w+b", buffering=0)  # noqa: SIM115
        self._clock.write(bytes(8))
        self._offset = mmap.mmap(self._clock.fileno(), 8)
        Path(directory, "clock.c").write_text(CLOCK)
        built = f"{directory}/clock.so"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-w", "-o", built, f"{directory}/clock.c"], check=True
        )
        self._environment = os.environ | {"LD_PRELOAD": built, "SOAK_CLOCK": f"{directory}/clock"}
        Path(directory, "daemon.yaml").write_text(CONFIG.format(directory=directory))
        self.take(self.engine)

    def take(self, engine: str) -> None:
        """Another engine from the watcher's next look on."""
        self.engine = engine
        new = Path(self.directory, "engine.new")
        new.write_text(engine)
        new.rename(Path(self.directory, "engine"))

    def jump(self, seconds: int) -> None:
        """The time of day is so much later than it is."""
        struct.pack_into("q", self._offset, 0, seconds)

    def start(self) -> None:
        words = [sys.executable, "-I", __file__, "--daemon", self.directory]
        words += ["--engine", "packet", "--foreground", "--socket", self.path]
        words += ["--config", f"{self.directory}/daemon.yaml"]
        before = len(self.text())
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                words, stderr=output, cwd="/", env=self._environment, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while "serving" not in self.text()[before:]:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"soak: the daemon did not start: {self.text()[before:]}")
            time.sleep(0.05)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(120)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def figures(self) -> tuple[int, int, int]:
        """Resident bytes, descriptors and threads now."""
        pid = self.process.pid
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        descriptors, threads = (len(os.listdir(f"/proc/{pid}/{name}")) for name in ("fd", "task"))
        return pages * os.sysconf("SC_PAGE_SIZE"), descriptors, threads


def traffic(stop: threading.Event) -> None:
    """Short connections, datagrams to and from ports of all kinds, processes that live a moment."""
    generator = random.Random(1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        while not stop.is_set():
            with socket.create_connection(server.getsockname()) as one, server.accept()[0] as two:
                one.sendall(b"x" * generator.randrange(1, 5000))
                two.recv(5000)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for _ in range(50):
                    sender.sendto(b"x", ("127.0.0.1", generator.randrange(1024, 65536)))
            if generator.random() < 0.05:
                subprocess.run(["true"], check=False)
            stop.wait(0.02)


def one_client(path: str, number: int, stop: threading.Event, wrong: list[str]) -> None:
    """A subscriber that reads, or does not, or asks, over and over."""
    generator = random.Random(number)
    filters = ["", "tcp", "udp", "uid 0", f"port {1024 + number}", 'pname "p*"']
    while not stop.is_set():
        with contextlib.suppress(Error), DaemonClient(path, timeout=60) as client:
            client.start(generator.choice(filters))
            until = time.monotonic() + generator.random() * 20
            reads = generator.random() < 0.7
            while time.monotonic() < until and not stop.is_set():
                if reads:
                    client.read(1)
                else:
                    stop.wait(1)
            client.owner(generator.randrange(65536))
            client.who(pid=os.getpid(), limit=100)
            client.request("usage", since=generator.random() * 1e6)
            if generator.random() < 0.7:
                end = client.unsubscribe()
                if end["matched"] != end["sent"] + end["dropped"]:
                    wrong.append(f"client {number}: {end}")
        stop.wait(generator.random())


def clients(path: str, numbers: range, stop: threading.Event) -> tuple[list[Any], list[str]]:
    wrong: list[str] = []
    threads = [
        threading.Thread(target=one_client, args=(path, number, stop, wrong)) for number in numbers
    ]
    for thread in threads:
        thread.start()
    return threads, wrong


def users(path: str) -> NoReturn:
    """USERS clients without rights, until this process is told to end; 1 for a wrong account."""
    os.setgroups([])
    os.setgid(USER)
    os.setuid(USER)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    threads, wrong = clients(path, range(CLIENTS, CLIENTS + USERS), stop)
    for thread in threads:
        thread.join()
    print("\n".join(wrong), file=sys.stderr, end="")
    sys.exit(bool(wrong))


@contextlib.contextmanager
def load(path: str, wrong: list[str]) -> Iterator[None]:
    """All clients and the traffic; they come back by themselves to a daemon that comes back."""
    stop = threading.Event()
    others = subprocess.Popen([sys.executable, __file__, "--users", path], cwd="/")
    sending = threading.Thread(target=traffic, args=(stop,))
    sending.start()
    threads, told = clients(path, range(CLIENTS), stop)
    try:
        yield
    finally:
        stop.set()
        others.terminate()
        for thread in (*threads, sending):
            thread.join()
        wrong += told
        if others.wait(120):
            wrong.append("an account of a user without rights")


def changes(one: Daemon, engines: list[str]) -> Iterator[str]:
    """What happens to a daemon that lives on, without end."""
    while True:
        for engine in engines[::-1]:
            for years in (YEARS, -YEARS, 0):
                one.jump(years)
                yield f"the clock jumps to {years:+} s"
            one.take(engine)
            yield f"engine {engine}"
        one.process.send_signal(signal.SIGHUP)
        yield "configuration read again"


def soak(one: Daemon, seconds: float, engines: list[str], wrong: list[str]) -> list[int]:
    """Resident bytes in the last life, 40 times; what was wrong goes to `wrong`."""
    one.start()
    begun = time.monotonic()
    with load(one.path, wrong):
        number = signal.SIGTERM
        while time.monotonic() - begun < seconds / 3:
            time.sleep(seconds / 18)
            code = one.end(number)
            if number == signal.SIGTERM and code:
                wrong.append(f"exit code {code}")
            number = signal.SIGKILL if number == signal.SIGTERM else signal.SIGTERM
            one.start()
    one.end()
    one.start()
    time.sleep(10)
    before = one.figures()
    samples, change = [], changes(one, engines)
    with load(one.path, wrong):
        for _ in range(40):
            next(change)
            time.sleep(seconds * 2 / 3 / 40)
            samples.append(one.figures()[0])
    one.jump(0)
    one.take("packet")
    deadline = time.monotonic() + 60
    while (after := one.figures()) and time.monotonic() < deadline:
        if all(now <= then + MORE for now, then in zip(after[1:], before[1:], strict=True)):
            break
        time.sleep(1)
    else:
        wrong.append(f"descriptors and threads: {before[1:]} before, {after[1:]} after")
    print(f"descriptors, threads: {before[1:]} before, {after[1:]} after the last life's clients")
    with DaemonClient(one.path, timeout=120) as client:
        client.start("port 1")
        account = client.unsubscribe()["account"]
    if not account["closes"]:
        wrong.append(f"the daemon's account: {account}")
    return samples


def usable_engines() -> list[str]:
    from nlproto.engines.engine import open_engine

    try:
        with open_engine("ebpf", lambda _: None):
            return ["packet", "ebpf"]
    except Error as error:
        print(f"soak: without engine ebpf: {error}")
        return ["packet", "packet"]


def main() -> int:
    if sys.argv[1:2] == ["--daemon"]:
        daemon(sys.argv[2], sys.argv[3:])
    if sys.argv[1:2] == ["--users"]:
        users(sys.argv[2])
    if os.environ.pop("SOAK_APART", ""):
        os.execvp("unshare", [*APART, sys.executable, __file__, *sys.argv[1:]])
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 600.0
    wrong: list[str] = []
    engines = usable_engines()
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        one = Daemon(directory)
        try:
            samples = soak(one, seconds, engines, wrong)
            if code := one.end():
                wrong.append(f"exit code {code}")
        finally:
            if one.process.poll() is None:
                one.process.kill()
                one.process.wait()
        text = one.text()
    second, last = max(samples[10:20]), max(samples[30:])
    takeovers = text.count("takes over")
    print(
        f"{seconds:.0f} s, {text.count('serving')} lives, {takeovers} takeovers:"
        f" {second >> 10:,} KiB in the second quarter, {last >> 10:,} in the last"
    )
    if last > second * GROWTH:
        wrong.append("the daemon grows")
    wrong += [f"the log has {word!r}" for word in ("Traceback", "does not close") if word in text]
    for line in wrong:
        print(f"soak: {line}", file=sys.stderr)
    if wrong:
        print(text[-8000:], file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
