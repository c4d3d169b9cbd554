# SPDX-License-Identifier: MIT
"""What a hunter says of mistakes, and of another program at its socket."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hunting import (
    HUNTER,
    hunt,
    hunt_as_nobody,
)
from nlproto.client.frames import Kind, encode_json
from waiting import patient

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="engine packet needs root")


def test_without_root_and_daemon_it_says_what_helps() -> None:
    done = hunt_as_nobody("--engine", "packet", "--duration", "200ms", "port 80")
    assert done.returncode == 1
    told = re.fullmatch(r"packet-hunter: .*needs root.*: sudo (.*)\n", done.stderr)
    assert told, done.stderr
    # what it tells is typed
    helped = subprocess.run(
        told[1], shell=True, capture_output=True, text=True, timeout=patient(60)
    )
    assert helped.returncode == 0 and "packets seen" in helped.stderr, helped.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["prot", "80"], 2, "did you mean 'port'"),
        (["--nonsense"], 2, "--nonsense"),
        (["-c", "0"], 2, "above 0"),
        (["-i", "nowhere0"], 2, "no interface"),
        (["--"], 2, "a command must follow"),
        (["--save", "x.txt"], 2, "--format"),
        (["--save", "/proc/nothing/x.csv"], 1, "cannot write"),
        (["--", "/no/such/program"], 127, "cannot run"),
        (["-r", "/no/such.csv"], 1, "cannot read"),
        (["-v", "who"], 2, "before the options"),
        (["who"], 1, "start it with"),
        (["-r", ""], 2, "-r/--read: an empty word means nothing"),
        (["--save="], 2, "--save/-w: an empty word means nothing"),
        (["who", "--pname", ""], 2, "--pname: an empty word means nothing"),
        (["-F", "/no/such"], 1, "cannot read the filter"),
        (["who", "0"], 2, "'0' is no port"),
        (["who", "nginx"], 2, "for the name of a program write '--pname nginx'"),
        (["--port", "443"], 2, "unrecognized arguments: --port; in a filter it is 'port ...'"),
        (["who", "--pid", "4294967296"], 2, "is no process id"),
        (["fleet"], 2, "are required: QUESTION;"),
        (["stats"], 1, "start it with"),
        (["top"], 1, "needs a terminal"),
        (["--direct"], 1, "start it with"),
        (["--save", "/dev/full", "--format", "csv"], 1, "No space left"),
        (["--save", "/dev/full", "--format", "parquet"], 1, "No space left"),
        (["--save", "x.pcap"], 2, "x.pcapng"),
        (["--engine", "module", "tcp"], 1, "or use --engine packet"),
        (["annotate", "/no/such", "-o", "x.pcapng"], 1, "cannot read"),
        (["report", "/no/such.csv", "-o", "x.html"], 1, "cannot read"),
    ],
)
def test_a_mistake_is_one_clear_line_and_the_right_code(
    arguments: list[str], code: int, words: str, tmp_path: Path
) -> None:
    sockets = ["--socket", str(tmp_path / "none"), "--engine", "packet"]
    if arguments[:2] == ["--engine", "module"] and os.path.exists("/sys/module/sniffer"):
        pytest.skip("the module is loaded here")
    place = 1 if arguments[0] in ("who", "stats", "top", "annotate") else 0
    if arguments[0] in ("-v", "report", "--engine", "fleet"):
        sockets = []
    elif arguments[0] in ("who", "stats", "annotate"):
        sockets = sockets[:2]
    done = hunt(*arguments[:place], *sockets, *arguments[place:])
    assert done.returncode == code, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["-c", "1"], ["top"], ["who", "--port", "80"], ["stats"], ["doctor"], ["--direct"]],
)
def test_a_socket_that_is_named_and_served_by_nobody_is_a_failure(
    arguments: list[str], tmp_path: Path
) -> None:
    """Packets of somewhere else would pass for the daemon's."""
    place = ["--socket", str(tmp_path / "none")]
    if arguments == ["top"]:
        master, slave = os.openpty()
        code = subprocess.run(
            [*HUNTER, "top", *place],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            timeout=60,
        ).returncode
        os.close(slave)
        told = os.read(master, 65536).decode()
        os.close(master)
    else:
        done = hunt(*arguments, *place)
        told = done.stderr if arguments != ["doctor"] else done.stdout
        code = done.returncode
    assert code == 1
    assert f"no daemon answers at {tmp_path}/none" in told
    assert arguments == ["doctor"] or len(told.splitlines()) == 1


@contextlib.contextmanager
def answering(path: Any, answer: Any) -> Iterator[Any]:
    """Something at `path` that answers the first request with `answer` and goes away."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        listener.settimeout(60)

        def serve() -> None:
            with contextlib.suppress(TimeoutError):  # nobody asked: the caller says why
                peer, _ = listener.accept()
                with peer:
                    peer.recv(1000)
                    peer.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


OTHER_RELEASE = {
    "id": 1,
    "ok": False,
    "error": "this daemon speaks protocol 2, not 1; install client and daemon of one release",
    "code": "usage",
}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (encode_json(Kind.CONTROL, OTHER_RELEASE), "of one release"),
        (b"SSH-2.0-OpenSSH_9.2 and more\n", "frame"),
        (b"", "try again"),
        (encode_json(Kind.CONTROL, OTHER_RELEASE)[:20], "try again"),
    ],
    ids=["another release", "another program", "nothing", "half an answer"],
)
def test_whoever_else_answers_at_the_socket_is_a_clear_failure(
    answer: Any, words: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "d.sock")
    with answering(path, answer):
        done = hunt("--socket", path)
    assert done.returncode == 1, done.stderr
    assert words in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_old_capture_survives_a_hunter_that_cannot_begin(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("precious")
    os.chmod(tmp_path, 0o777)
    os.chown(path, 65534, 65534)
    done = hunt_as_nobody("--engine", "packet", "--save", path)
    assert done.returncode == 1
    assert path.read_text() == "precious"


def test_root_refuses_a_directory_that_others_can_write(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    done = hunt("--help", cwd=tmp_path)
    assert done.returncode == 1 and "others can write" in done.stderr
