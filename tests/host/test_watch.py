# SPDX-License-Identifier: MIT
"""hunter watch: what is new is reported once, harmless, to users who may see it and a webhook."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemons import NOBODY, Daemon, StartDaemon
from hunting import HUNTER
from nlproto.client.client import DaemonClient
from waiting import patient, stand_in, there, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="engine packet needs root")

HOSTILE = "w\x1b]0;\n[b]"


@pytest.fixture(name="watched")
def _watched(start: StartDaemon, directory: Path) -> Any:
    return start(config=f"history: {directory}/history.db\nflush_interval: 100ms\n")


def talk(directory: Path, name: Any, port: int, **more: Any) -> None:
    """A program called `name` sends to `port`."""
    program = directory / name
    shutil.copy(there(shutil.which("bash")), program)
    program.chmod(0o755)
    # engine packet names who has the socket still
    code = f"exec 3<>/dev/udp/127.0.0.1/{port}; for n in 1 2 3 4 5 6; do echo >&3; sleep 0.2; done"
    subprocess.run([program, "-c", code], check=True, cwd="/", **more)


def talk_until(condition: Any, directory: Path, name: Any, **more: Any) -> None:
    """Beside other traffic engine packet may be too late for all that a program sent: again."""

    def attempt() -> Any:
        talk(directory, name, 9, **more)
        return condition()

    until(attempt, 60, f"{name} was seen")


def watch(daemon: Daemon, *words: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [*HUNTER, "watch", "--socket", daemon.path, *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=patient(60), check=False, **more
    )


def found(daemon: Daemon, kind: Any, **fields: Any) -> list[Any]:
    with DaemonClient(daemon.path) as client:
        return [
            one
            for one in client.news(kind, since=3600)["news"]
            if all(one[name] == value for name, value in fields.items())
        ]


def test_a_program_a_destination_and_a_listener_are_told_harmless(
    watched: Any, directory: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        own = server.getsockname()[1]
        about = f"tcp 127.0.0.1.{own}"
        until(lambda: found(watched, "listener", about=about), 30, "the listener")
        talk_until(lambda: found(watched, "program", name=HOSTILE), directory, HOSTILE)
        done = watch(watched, "--once", "--since", "1h")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "\x1b" not in done.stdout and all("new " in line for line in lines)
    assert any(" new program w" in line for line in lines)
    (heard,) = [line for line in lines if f" new listener {about} " in line]
    assert f".{os.getpid()} of root" in heard
    # other programs of this machine may have been first
    assert any(" new destination 127.0.0.1 " in line for line in lines)
    assert "known since" in done.stderr
    # as programs read it, and as the journal does
    done = watch(watched, "--once", "--since", "1h", "--json", "--journal", "program")
    told = [json.loads(line) for line in done.stdout.splitlines()]
    (one,) = [one for one in told if one["name"] == HOSTILE]
    assert one["kind"] == "program" and one["before"] is None
    assert any(line.startswith("<4>new program w") for line in done.stderr.splitlines())
    # nothing new in no time: 1, as grep
    assert watch(watched, "--once", "--since", "0s", "listener").returncode == 1


def test_a_user_without_rights_is_told_of_own_processes_alone(
    watched: Any, directory: Path
) -> None:
    talk_until(lambda: found(watched, "program", name="of-root"), directory, "of-root")
    nobody = {"user": NOBODY, "group": NOBODY}
    talk_until(
        lambda: found(watched, "program", name="of-nobody"), directory, "of-nobody", **nobody
    )
    code = (
        "import json, os, sys; from nlproto.client.client import DaemonClient\n"
        "os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))\n"
        "with DaemonClient(sys.argv[1]) as client:\n"
        "    print(json.dumps([client.news(kind, since=3600)\n"
        "        for kind in ('program', 'destination', 'listener')]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, watched.path, str(NOBODY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert {one["uid"] for answer in answers for one in answer["news"]} == {NOBODY}
    assert {one["uid"] for answer in answers for one in answer["processes"]} <= {NOBODY}
    # root knew that destination already: it is new to this user all the same
    assert [one["name"] for one in answers[1]["news"]] == ["127.0.0.1"]


class Hook(http.server.ThreadingHTTPServer):
    """Fails once, then takes what it gets."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Hook)
        self.tries = 0
        self.taken: list[Any] = []


class _Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server = stand_in(self.server)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.tries += 1
        status = 503 if server.tries == 1 else 200
        if status == 200:
            server.taken.append(json.loads(body))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def hook() -> Iterator[Hook]:
    with Hook() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_a_webhook_gets_each_finding_once_and_is_tried_again(watched: Any, directory: Path) -> None:
    talk_until(lambda: found(watched, "program", name="hooked"), directory, "hooked")
    with hook() as server:
        url = f"http://127.0.0.1:{server.server_port}/net"
        done = watch(watched, "--once", "--since", "1h", "--webhook", url, "program")
    assert done.returncode == 0, done.stderr
    assert len(server.taken) == len(done.stdout.splitlines())
    assert [one["name"] for one in server.taken].count("hooked") == 1


def test_what_no_webhook_takes_is_counted_and_said(watched: Any, directory: Path) -> None:
    talk_until(lambda: found(watched, "program", name="unhooked"), directory, "unhooked")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/"
        done = watch(watched, "--once", "--since", "1h", "--webhook", url, "program")
    assert done.returncode == 2
    assert "findings were not taken" in done.stderr and " new program unhooked " in done.stdout
    bad = watch(watched, "--once", "--webhook", "file:///etc/passwd")
    assert bad.returncode == 2 and "--webhook is an address" in bad.stderr


def test_it_goes_on_and_tells_nothing_twice(watched: Any, directory: Path) -> None:
    command = [*HUNTER, "watch", "--socket", watched.path, "program"]
    out, err = directory / "out", directory / "err"
    with open(out, "w") as stdout, open(err, "w") as stderr:
        one = subprocess.Popen(command, stdout=stdout, stderr=stderr)
    try:
        until(lambda: "known since" in err.read_text())
        for name in ("first-one", "second-one", "first-one"):
            talk(directory, name, 9)
        until(lambda: "second-one" in out.read_text(), 40)
        one.terminate()
        assert one.wait(patient(20)) == 0
    finally:
        one.kill()
        one.wait()
    for name in ("first-one", "second-one"):
        assert out.read_text().count(f"new program {name} ") == 1


def test_without_a_history_on_disk_it_says_what_to_do(daemon: Daemon) -> None:
    done = watch(daemon, "--once")
    assert done.returncode == 2 and "set 'history' in daemon.yaml" in done.stderr
