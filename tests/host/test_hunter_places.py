# SPDX-License-Identifier: MIT
"""The hunter where processes live: in containers and namespaces, and beside a dead resolver."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from waiting import patient, there, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="engine packet and namespaces need root")

HUNTER = [sys.executable, "-m", "hunter"]

# A datagram to itself and back every 10 ms, under a name of its own
INSIDE = """
import ctypes, os, socket, subprocess, sys, time
ctypes.CDLL(None).prctl(15, b"inside-worker", 0, 0, 0)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.1", 0))
print(os.getpid(), os.stat("/proc/self/ns/net").st_ino, flush=True)
while True:
    udp.sendto(b"x", udp.getsockname())
    udp.recv(10)
    time.sleep(0.01)
"""


@contextlib.contextmanager
def cgroup2() -> Iterator[Any]:
    """Where cgroup2 is mounted and can be written; else (a bare root) a mount for the tests."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2" and os.access(place, os.W_OK):
            yield Path(place)
            return
    with tempfile.TemporaryDirectory() as place:
        command = ["mount", "-t", "cgroup2", "none", place]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"no cgroup2 to write to, and none can be mounted: {done.stderr.strip()}")
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", place], check=True)


@contextlib.contextmanager
def own_cgroup(called: Any) -> Iterator[Any]:
    """A cgroup so named, as runtimes of containers make them."""
    with cgroup2() as root:
        path = root / called
        path.mkdir()
        try:
            yield path
        finally:
            until(lambda: not (path / "cgroup.procs").read_text())
            path.rmdir()


def name(identity: Any) -> str:
    return f"hunter-{identity[:12]}"


@contextlib.contextmanager
def config_of_docker(identity: Any) -> Iterator[Any]:
    """What docker would keep of the container; on a machine without docker all of it goes again."""
    place = Path("/var/lib/docker/containers", identity)
    new = next(one for one in [*reversed(place.parents), place] if not one.exists())
    place.mkdir(parents=True)
    config = {"ID": identity, "Name": f"/{name(identity)}", "Config": {"Image": "worker:1"}}
    (place / "config.v2.json").write_text(json.dumps(config))
    try:
        yield
    finally:
        shutil.rmtree(new)


@pytest.fixture(scope="module")
def container() -> Iterator[tuple[Any, ...]]:
    """(id, pid here, network namespace) of a process in namespaces and a cgroup of its own."""
    identity = uuid.uuid4().hex * 2
    with config_of_docker(identity), own_cgroup(f"docker-{identity}.scope") as cgroup:
        enter = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        unshare = "unshare --pid --net --mount --fork --kill-child --mount-proc".split()
        process = subprocess.Popen(
            ["sh", "-c", enter, cgroup, *unshare, sys.executable, "-c", INSIDE],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            inside, netns = there(process.stdout).readline().split()
            assert inside == "1"  # of its own pid namespace
            pids = {int(pid) for pid in (cgroup / "cgroup.procs").read_text().split()}
            (pid,) = pids - {process.pid}
            subprocess.run(["ip", "netns", "attach", name(identity), str(pid)], check=True)
            yield identity, pid, int(netns)
        finally:
            subprocess.run(["ip", "netns", "delete", name(identity)], check=False)
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def outside() -> Iterator[Any]:
    """Traffic of this namespace, by a process that is in no container."""
    own = os.stat("/proc/self/ns/net").st_ino
    program = INSIDE.replace("inside-worker", "outside")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert int(there(process.stdout).readline().split()[1]) == own
        yield process.pid
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "words",
    [
        ["--container", "ID12"],
        ["--container", "ID64"],
        ["--container", "docker:ID12"],
        ["--container", "NAME"],
        ["--container", "docker:NAME"],
        ["--parent", "unshare"],
        ["--cmdline", "*python*", "--container", "NAME"],
        ["--container", "docker:*"],
        ["--netns", "NETNS"],
        ["--netns", "NAME"],
        ["--pname", "inside-worker"],
        ["--pname", "inside-*", "--netns", "NETNS", "--container", "ID12"],
        ["--pid", "PID"],
    ],
    ids=" ".join,
)
def test_a_process_in_a_container_is_found_by_its_place_and_name(
    words: list[str], container: tuple[Any, ...], outside: Any, tmp_path: Path
) -> None:
    identity, pid, netns = container
    here = {"ID12": identity[:12], "ID64": identity, "NETNS": str(netns), "PID": str(pid)}
    here["NAME"] = name(identity)
    options = [re.sub("[A-Z]{2,}[0-9]*", lambda found: here[found[0]], word) for word in words]
    alone = ["--socket", str(tmp_path / "none"), "--engine", "packet"]
    command = [*HUNTER, *alone, "--json", "-c", "20", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patient(100))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 20
    assert {(row["pid"], row["comm"], row["netns"]) for row in rows} == {
        (pid, "inside-worker", netns)
    }
    assert {(row["container"], row["container_name"], row["image"]) for row in rows} == {
        (f"docker:{identity[:12]}", name(identity), "worker:1")
    }
    assert rows[0]["parents"][0]["comm"] == "unshare"
    seen = re.search(r"(\d+) packets seen", done.stderr)
    assert int(there(seen)[1]) > 20  # there was other traffic, which did not fit


def test_a_line_shows_the_container_of_its_process(
    container: tuple[Any, ...], tmp_path: Path
) -> None:
    identity, pid, netns = container
    command = [*HUNTER, "--socket", str(tmp_path / "none"), "--engine", "packet", "-n", "-c", "4"]
    done = subprocess.run(
        [*command, "--netns", str(netns)], capture_output=True, text=True, timeout=patient(100)
    )
    for line in done.stdout.splitlines():
        assert f" inside-worker.{pid} docker:{name(identity)} netns " in line, line
    assert len(done.stdout.splitlines()) == 4


# In namespaces of its own: a name server that takes questions and never answers, packets between
# addresses that only it could name, and the hunter.
DEAD_RESOLVER = """
import json, pathlib, socket, subprocess, sys, threading, time
directory = pathlib.Path(sys.argv[1])
for name, text in {
    "resolv.conf": "nameserver 127.0.0.53\\noptions timeout:30 attempts:5\\n",
    "nsswitch.conf": "hosts: files dns\\nservices: files\\npasswd: files\\n",
}.items():
    (directory / name).write_text(text)
    target = pathlib.Path("/etc", name).resolve()
    if not target.exists():
        sys.exit(f"no {target} to mount over")
    subprocess.run(["mount", "--bind", directory / name, target], check=True)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
subprocess.run(["ip", "address", "add", "10.99.0.1/24", "dev", "lo"], check=True)
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.53", 53))
asked = threading.Event()
threading.Thread(target=lambda: (server.recv(1000), asked.set()), daemon=True).start()

def talk():
    peers = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(50)]
    for number, peer in enumerate(peers, 1):
        peer.bind((f"10.99.0.{number}", 5000))
    while True:
        for peer in peers:
            peer.sendto(b"x", ("10.99.0.1", 5000))
        peers[0].recv(10)
        time.sleep(0.05)

threading.Thread(target=talk, daemon=True).start()
hunter = [sys.executable, "-m", "hunter", "--socket", directory / "none", "--engine", "packet"]
done = subprocess.run(
    [*hunter, "-c", "200", "udp port 5000"], capture_output=True, text=True, timeout=100
)
print(json.dumps([done.returncode, done.stdout, done.stderr, asked.wait(0)]))
"""


def test_a_resolver_that_never_answers_holds_up_no_line_and_no_end(tmp_path: Path) -> None:
    """One lookup lasts 150 s; 200 packets of 50 addresses are shown, and it ends, before."""
    own = ["unshare", "--mount", "--net", "--propagation", "private"]
    done = subprocess.run(
        [*own, sys.executable, "-c", DEAD_RESOLVER, tmp_path],
        capture_output=True,
        text=True,
        timeout=patient(200),
    )
    assert done.returncode == 0, done.stderr
    code, lines, told, asked = json.loads(done.stdout)
    assert code == 0, told
    assert asked  # the names were looked up, and nobody answered
    addresses = set()
    for line in lines.splitlines():
        found = re.search(r" udp (10\.99\.0\.\d+)\.5000 > 10\.99\.0\.1\.5000 len 29 \S+\.\d+", line)
        assert found, line
        addresses.add(found[1])
    assert len(lines.splitlines()) == 200 and len(addresses) > 20
