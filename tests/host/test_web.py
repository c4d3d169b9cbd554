# SPDX-License-Identifier: MIT
"""hunter web: the page of a real daemon, asked as a browser asks, and as others try to."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemons import NOBODY, Daemon, send
from waiting import patient, there, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="engine packet needs root")


AS_USER = f"""
import os, sys
import encodings.idna
import hunter.web.web
from hunter.__main__ import main
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
sys.exit(main(sys.argv[1:]))
"""


class Page:
    """A running `hunter web`, and requests to it."""

    def __init__(self, path: Any, *how: Any) -> None:
        words = [sys.executable, "-I", *(how or ("-m", "hunter")), "web", "--socket", str(path)]
        self.path = str(path)
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/"
        )
        self.url = there(self.process.stdout).readline().strip()
        self.port = int(self.url.rpartition(":")[2].partition("/")[0])
        self.secret = self.url.partition("#")[2]

    def get(
        self, path: Any, secret: Any = None, method: str = "GET", **headers: Any
    ) -> tuple[Any, ...]:
        """Status, headers and body."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=patient(20))
        if secret:
            headers["Authorization"] = f"Bearer {secret}"
        link.request(method, path, headers=headers)
        reply = link.getresponse()
        body = reply.read()
        link.close()
        return reply.status, reply.headers, body

    def ask(self, path: Any) -> Any:
        status, _, body = self.get(path, self.secret)
        assert status == 200, body
        return json.loads(body)

    def end(self) -> tuple[Any, ...]:
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=patient(20))
        return self.process.returncode, errors


@pytest.fixture
def page(daemon: Daemon) -> Iterator[Page]:
    page = Page(daemon.path)
    yield page
    code, errors = page.end()
    assert code == 0 and "Traceback" not in errors, errors


def test_it_shows_who_sends_now_and_before(page: Page, receiver: socket.socket) -> None:
    port = receiver.getsockname()[1]

    def mine() -> list[Any]:
        send(port, 3)
        rows = page.ask("/live")["processes"]
        return [one for one in rows if one["pid"] == os.getpid() and one["packets"]]

    (one,) = until(mine, 30, "this process on the page")
    assert one["comm"] and one["exe"] == os.path.realpath(sys.executable)
    of = page.ask(f"/flows?pid={one['pid']}&start_ns={one['start_ns']}")
    assert port in {flow["rport"] for flow in of["flows"]} | {f["lport"] for f in of["flows"]}
    assert "named" in page.ask("/live")["account"]
    answer = until(lambda: page.ask(f"/who?port={port}&proto=udp"), 30, "an answer")
    assert os.getpid() in {owner["pid"] for owner in answer["owners"]}
    assert page.ask("/who?pname=no-such-program")["flows"] == []


def test_an_answer_needs_the_secret(page: Page) -> None:
    for path in ("/live", "/flows?pid=1&start_ns=0", "/who?port=1"):
        for secret in (None, "x", page.secret[:-1], page.secret + "x", "\xe9"):
            status, _, body = page.get(path, secret)
            assert status == 401 and list(json.loads(body)) == ["error"]
    status, headers, body = page.get("/")
    assert status == 200 and page.secret.encode() not in body
    assert "unsafe" not in headers["Content-Security-Policy"]


def test_a_page_of_another_name_gets_nothing(page: Page) -> None:
    for host in ("evil.example", f"evil.example:{page.port}", "127.0.0.1", "0.0.0.0"):
        for path in ("/", "/live"):
            assert page.get(path, page.secret, Host=host)[0] == 403


def test_a_bad_question_gets_a_line(page: Page) -> None:
    who = ("port=x", "since=nan", "since=inf", "at=1", "proto=sctp", "limit=-1", "host=%00")
    for path in (*(f"/who?{words}" for words in who), "/flows"):
        status, _, body = page.get(path, page.secret)
        assert status == 400 and "\n" not in json.loads(body)["error"], path


def test_it_reads_only(page: Page) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert page.get("/live", page.secret, method)[0] == 501
    assert page.get("/../../etc/passwd", page.secret)[0] == 404


def test_connections_that_show_no_secret_make_room_for_who_has_it(page: Page) -> None:
    """Silent ones, and some that go on to say a little, as fast as places are there."""
    places = [_idle(page) for _ in range(40)]
    for turn in range(60):
        places.append(_idle(page))
        with contextlib.suppress(OSError):
            places[-3].send(b"X: y\r\n")
        if turn % 10 == 0:
            assert page.get("/live", page.secret)[0] == 200
    for one in places:
        one.close()


def _idle(page: Any) -> Any:
    """A connection of another user, who begins a request and never ends it."""
    one = socket.create_connection(("127.0.0.1", page.port))
    one.send(b"GET /live HTTP/1.0\r\n")
    return one


def test_without_rights_it_shows_what_the_daemon_shows_to_that_user(
    daemon: Daemon, receiver: socket.socket
) -> None:
    page = Page(daemon.path, "-c", AS_USER)
    port = receiver.getsockname()[1]
    send(port, 3)
    try:
        assert page.ask(f"/who?port={port}")["owners"] == []
        assert page.ask("/live")["processes"] == []
    finally:
        code, errors = page.end()
    assert code == 0 and "your own processes" in errors


def test_a_port_that_is_taken_and_no_daemon_end_with_a_line(page: Page, tmp_path: Path) -> None:
    words = [sys.executable, "-I", "-m", "hunter", "web", "--socket"]
    for last, told in (
        ([page.path, "--port", str(page.port)], "choose another --port"),
        ([str(tmp_path / "none.sock")], "start it with"),
    ):
        done = subprocess.run([*words, *last], capture_output=True, text=True, timeout=60, cwd="/")
        assert done.returncode == 1
        assert told in done.stderr and done.stderr.count("\n") == 1, done.stderr
