# SPDX-License-Identifier: MIT
"""-- CMD: the packets of CMD and what it starts, and its exit code; --summary (root)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from waiting import patient, there

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="engine packet needs root")

HUNTER = [sys.executable, "-m", "hunter"]

SAY = """
import os, socket, sys, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
    peer.connect(("127.0.0.1", int(sys.argv[1])))
    time.sleep(float(sys.argv[3]))
    peer.send(sys.argv[2].encode())
    time.sleep(float(sys.argv[3]))
open(sys.argv[4] + sys.argv[2], "w").close()
"""
"""Its socket is there long enough for engine packet to name it."""


def hunt(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HUNTER, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


@pytest.fixture
def heard() -> Iterator[Any]:
    """A port, and what came in there; others talk to it all the time."""
    ended = threading.Event()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
    ):
        server.bind(("127.0.0.1", 0))
        other.connect(server.getsockname())

        def chatter() -> None:
            with contextlib.suppress(OSError):
                while not ended.wait(0.02):
                    other.send(b"others")

        thread = threading.Thread(target=chatter)
        thread.start()
        yield server.getsockname()[1]
        ended.set()
        thread.join()


@pytest.fixture
def script(tmp_path: Path, heard: Any) -> list[Any]:
    """A command whose children, orphans and daemons each say one word; it ends with 7."""
    (tmp_path / "say.py").write_text(SAY)
    said = tmp_path / "said"
    said.mkdir()
    said.chmod(0o777)

    def say(word: Any) -> str:
        return f"{sys.executable} {tmp_path}/say.py {heard} {word} {patient(0.4)} {said}/"

    path = tmp_path / "script.sh"
    lines = [
        f"rm -f {said}/*",
        say("child"),
        f"( ( {say('orphan')} & ) & )",
        f"setsid -f sh -c '{say('daemon')}; true'",
        f"until [ -e {said}/orphan ] && [ -e {said}/daemon ]; do sleep 0.1; done",
        "exit 7",
    ]
    path.write_text("\n".join(lines))
    os.chmod(tmp_path, 0o755)
    return ["sh", path]


def figures(stderr: Any) -> tuple[Any, ...]:
    delivered = int(there(re.search(r" records = (\d+) delivered", stderr))[1])
    shown = int(there(re.search(r"(\d+) (?:shown|saved) = ", stderr))[1])
    others = re.search(r"(\d+) not of the command = (\d+) named[^+]* \+ (\d+) unnamed", stderr)
    assert int(there(others)[1]) == int(there(others)[2]) + int(there(others)[3])
    return delivered, shown, int(there(others)[1])


def test_alone_it_shows_the_commands_own_packets_and_counts_the_others(
    script: list[Any], heard: Any, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    done = hunt("--engine", "packet", "--save", path, "--", *script)
    assert done.returncode == 7, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if heard in (row["sport"], row["dport"])]
    assert {row["dir"] for row in rows} == {"out"}
    assert len({row["pid"] for row in rows}) == 3, done.stderr
    delivered, shown, others = figures(done.stderr)
    assert delivered == shown + others and others > 10


def test_a_command_that_cannot_start_shows_nobodys_packets(heard: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    done = hunt("--engine", "packet", "--save", path, "--print", f"port {heard}", "--", tmp_path)
    assert done.returncode == 126 and f"cannot run {tmp_path}" in done.stderr
    delivered, shown, others = figures(done.stderr)
    # delivered: of other programs too, which the filter passes over
    assert shown == 0 < others <= delivered, done.stderr
    assert done.stdout == path.read_text() == ""


@pytest.mark.parametrize("sudo", [{}, {"SUDO_UID": "65534", "SUDO_GID": "65534"}])
@pytest.mark.parametrize(
    ("text", "mode", "code", "words"),
    [
        (None, 0, 127, "is it installed?"),
        ("x", 0o644, 126, "Permission denied"),
        ("", 0o755, 126, "Exec format error"),
        ("#!/no/such\n", 0o755, 127, "is its interpreter installed?"),
    ],
)
def test_the_exit_code_of_one_that_cannot_start_is_env_s(
    text: str | None, mode: int, code: int, words: str, sudo: dict[str, Any], tmp_path: Path
) -> None:
    program = tmp_path / "program"
    if text is not None:
        program.write_text(text)
        program.chmod(mode)
    for place in (tmp_path, *tmp_path.parents[:2]):
        place.chmod(0o755)
    done = hunt("--engine", "packet", "-qq", "--", program, env={**os.environ, **sudo})
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "cannot run" in line]
    assert words in line


def test_through_the_daemon_it_does_so_for_a_user_without_rights(
    script: list[Any], heard: Any, daemon_socket: Any
) -> None:
    nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all,+dac_read_search"
    nobody += " --ambient-caps=+dac_read_search --bounding-set=-all,+dac_read_search"
    done = subprocess.run(
        [*nobody.split(), *HUNTER, "--socket", daemon_socket, "-n", f"port {heard}", "--", *script],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 7, done.stderr
    owners = re.findall(r" out udp \S+ > \S+ len \d+ (\S+)", done.stdout)
    assert len(set(owners)) == 3, done.stdout + done.stderr


@pytest.fixture
def daemon_socket(tmp_path: Path) -> Iterator[Any]:
    path = tmp_path / "d.sock"
    command = [sys.executable, "-m", "daemon", "--engine", "packet", "--socket", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        line = there(process.stderr).readline()
        while "serving" not in line:
            assert line, "the daemon ended at once"
            line = there(process.stderr).readline()
        yield path
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_with_all_everybodys_packets_are_shown(script: list[Any], heard: Any) -> None:
    done = hunt("--engine", "packet", "--all", "-n", f"port {heard}", "--", *script)
    assert done.returncode == 7
    assert re.search(rf" in  udp 127\.0\.0\.1\.\d+ > 127\.0\.0\.1\.{heard} len 34 ", done.stdout)
    assert "not of the command" not in done.stderr


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -TERM $$", 143), ("kill -9 $$", 137)]
)
def test_the_exit_code_is_the_commands(script: str, code: int) -> None:
    done = hunt("--engine", "packet", "-qq", "--", "sh", "-c", script)
    assert done.returncode == code, done.stderr


def test_a_command_that_is_ended_by_duration_is_no_failure() -> None:
    done = hunt("--engine", "packet", "--duration", "300ms", "--", "sleep", "60")
    assert done.returncode == 0, done.stderr


def test_under_sudo_the_command_runs_as_the_user() -> None:
    environment = {**os.environ, "SUDO_UID": "65534", "SUDO_GID": "65534", "SUDO_USER": "nobody"}
    done = hunt("--engine", "packet", "-qq", "port", "1", "--", "id", "-u", env=environment)
    assert (done.stdout, done.returncode) == ("65534\n", 0), done.stderr


def test_quiet_twice_says_nothing_but_losses() -> None:
    done = hunt("--engine", "packet", "-qq", "--duration", "300ms", "port", "1")
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_the_summary_alone_is_the_table_alone(script: list[Any], heard: Any) -> None:
    done = hunt("--engine", "packet", "--summary", f"port {heard}", "--", *script)
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["pid", "packets", "bytes", "far", "ends", "process", "executable"]
    assert len([line for line in lines if " 1 " in line]) == 3
    assert " > " not in done.stdout and " shown = " in done.stderr


def test_a_program_is_called_as_it_was_run_and_its_file_is_told_too(
    tmp_path: Path, heard: Any
) -> None:
    """As redis-server, which is a link to redis-check-rdb."""
    program, link = os.path.realpath(sys.executable), tmp_path / "other-name"
    link.symlink_to(program)
    send = f"""
import socket, time
one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
one.sendto(b"x", ("127.0.0.1", {heard}))
time.sleep(0.5)
"""
    done = hunt("--engine", "packet", "--summary", f"port {heard}", "--", link, "-c", send)
    (line,) = (one for one in done.stdout.splitlines() if "other-name" in one)
    assert line.split()[-2:] == ["other-name", program]


@pytest.mark.parametrize("extra", [["--print"], ["--json"], ["--save", "-", "--format", "csv"]])
def test_beside_other_output_the_summary_goes_to_stderr(
    extra: list[str], script: list[Any], heard: Any
) -> None:
    done = hunt("--engine", "packet", "--summary", *extra, f"port {heard}", "--", *script)
    assert "far ends" in done.stderr and "far ends" not in done.stdout
    assert len(done.stdout.splitlines()) >= 3
