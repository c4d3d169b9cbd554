# SPDX-License-Identifier: MIT
"""packet-hunter doctor, and what start-up says of foreign packages."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from hunter.commands.doctor import examine
from nlproto.client.frames import Decoder, Kind, encode_json, parse_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def environment(tmp_path: Path) -> Any:
    """Our packages copied to a site directory that another project shares."""
    site = tmp_path / "site"
    for name in ("nlproto", "hunter", "daemon"):
        shutil.copytree(ROOT / "python" / name, site / name)
    return site


def hunter(site: Any, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hunter", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=ROOT,
        check=False,
    )


def test_doctor_names_each_part_and_what_to_do_next(environment: Any, tmp_path: Path) -> None:
    done = hunter(environment, "doctor", "--socket", str(tmp_path / "none.sock"))
    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert list(lines) == ["packages", "module", "probes", "ebpf", "drops", "daemon"]
    assert lines["packages"].startswith("ok")
    assert "start it with" in lines["daemon"]
    # who names a socket says that a daemon is there
    assert lines["daemon"].startswith("bad") and done.returncode == 1


def test_that_no_daemon_runs_is_no_fault(environment: Any, tmp_path: Path) -> None:
    states = {one.subject: one.state for one in examine(str(tmp_path / "none.sock"))}
    assert states["daemon"] == "note"


def serve(path: Any, stats: Any) -> Any:
    """A daemon of another release: it answers hello, and `stats` to the next request."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def run() -> None:
        with listener, listener.accept()[0] as peer:
            decoder = Decoder(1 << 20)
            for reply in ({"ok": True, "protocol": 1, "version": "9"}, stats):
                frames: list[Any] = []
                while not frames:
                    frames = list(decoder.feed(peer.recv(65536)))
                number = parse_json(frames[0][1])["id"]
                peer.sendall(encode_json(Kind.CONTROL, reply | {"id": number}))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("stats", "state", "words"),
    [
        ({"ok": True, "pid": 5, "engine": "packet", "client": {}}, "ok", "pid 5, engine packet"),
        ({"ok": True}, "ok", "pid ?"),
        ({"ok": True, "pid": 5, "clients": {"connected": 1}}, "ok", ", 1 client"),
        ({"ok": True, "pid": 5, "clients": {"connected": 3}}, "ok", ", 3 clients"),
        ({"ok": True, "pid": 5, "clients": None}, "ok", "pid 5"),
        ({"ok": False, "error": "not for you", "code": "denied"}, "bad", "not for you"),
        ({"ok": False, "error": "too much to do", "code": "busy"}, "bad", "too much to do"),
    ],
)
def test_doctor_works_whatever_the_daemon_tells(
    stats: dict[str, Any], state: str, words: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "d.sock")
    thread = serve(path, stats)
    found = {one.subject: one for one in examine(path)}
    thread.join()
    assert list(found) == ["packages", "module", "probes", "ebpf", "drops", "daemon"]
    assert found["daemon"].state == state and words in found["daemon"].text


def test_doctor_goes_on_after_a_part_that_cannot_be_looked_at(tmp_path: Path) -> None:
    (tmp_path / "version").mkdir()  # no file
    found = {one.subject: one for one in examine(str(tmp_path / "none"), module=tmp_path)}
    assert found["module"].state == "bad" and "cannot be checked" in found["module"].text
    assert list(found) == ["packages", "module", "probes", "ebpf", "drops", "daemon"]


@pytest.mark.parametrize("mark", ["daemon.py", "pidfile.py"])
def test_a_foreign_daemon_installed_over_ours_is_reported(environment: Any, mark: str) -> None:
    (environment / "daemon" / mark).write_text("")
    doctor = hunter(environment, "doctor")
    assert doctor.returncode == 1
    assert f"{environment}/daemon/{mark} is another project's 'daemon'" in doctor.stdout
    assert "of its own" in doctor.stdout


def test_a_foreign_daemon_found_before_ours_is_reported_at_start_up(
    environment: Any, tmp_path: Path
) -> None:
    shutil.rmtree(environment / "daemon")
    (environment / "daemon.py").write_text("")
    # A plain module in another directory, found first.
    other = tmp_path / "other"
    other.mkdir()
    (environment / "daemon.py").rename(other / "daemon.py")
    done = subprocess.run(
        [sys.executable, "-m", "hunter", "stats", "--socket", str(tmp_path / "none.sock")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{other}:{environment}"},
        cwd=ROOT,
        check=False,
    )
    assert "is another project's 'daemon'" in done.stderr
    assert done.returncode == 1  # no daemon to ask, told after it
