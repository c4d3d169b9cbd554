# SPDX-License-Identifier: MIT
"""The page of `hunter web` in a real browser, filled by a real daemon.

`make test-browser`; PACKET_HUNTER_WEB_PICTURE=docs/web.png keeps the picture.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from browsing import BROWSER, OPTIONS
from daemons import Daemon, send
from waiting import patient

pytestmark = [
    pytest.mark.skipif(not BROWSER, reason="chromium is not installed: ./build.sh --browser"),
    pytest.mark.skipif(os.geteuid() != 0, reason="engine packet needs root"),
]


@pytest.fixture
def page(tmp_path: Path) -> Iterator[str]:
    daemon = Daemon(tmp_path)
    words = [sys.executable, "-I", "-m", "hunter", "web", "--socket", daemon.path]
    web = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd="/")
    assert web.stdout is not None
    yield web.stdout.readline().strip()
    web.send_signal(signal.SIGINT)
    assert web.wait(patient(20)) == 0
    assert daemon.stop() == 0


def browse(url: str, profile: Path, *options: str) -> tuple[str, str]:
    """Run the browser, which may talk to loopback alone; its standard output and error."""
    only_here = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    done = subprocess.run(
        [str(BROWSER), *OPTIONS, f"--user-data-dir={profile}", only_here, *options, url],
        capture_output=True,
        text=True,
        timeout=patient(120),
        check=True,
    )
    return done.stdout, done.stderr


def test_the_browser_shows_who_sends(page: str, tmp_path: Path) -> None:
    send(9, 200, 0.02)
    document, told = browse(page, tmp_path / "profile", "--virtual-time-budget=4000", "--dump-dom")
    assert "Refused" not in told and "CONSOLE" not in told, told
    name = open("/proc/self/comm").read().strip()
    assert f"<td>{name}</td>" in document or f">{name}<" in document, document
    assert os.path.realpath(sys.executable) in document
    wanted = os.environ.get("PACKET_HUNTER_WEB_PICTURE")
    if wanted:
        picture = tmp_path / "web.png"
        browse(page, tmp_path / "profile", "--virtual-time-budget=4000", f"--screenshot={picture}")
        shutil.copy(picture, wanted)


def test_without_the_secret_it_says_what_is_missing(page: str, tmp_path: Path) -> None:
    bare = page.partition("#")[0]
    document, _ = browse(bare, tmp_path / "profile", "--virtual-time-budget=2000", "--dump-dom")
    assert "the part behind # is missing" in document
    assert os.path.realpath(sys.executable) not in document
