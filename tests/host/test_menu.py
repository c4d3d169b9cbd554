# SPDX-License-Identifier: MIT
"""make menu, driven as a person does: through a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


AFTER = r"\n(done|failed, exit \d+)\r?\n(.|\n)*looks again\)\r?\n> $"
"""A command has ended, and the menu waits for a key."""


class Terminal:
    """A program on a terminal of its own (context manager)."""

    def __init__(self, *command: str) -> None:
        self._command = command

    def __enter__(self) -> Terminal:
        self._master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        self.process = subprocess.Popen(
            self._command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )
        os.close(slave)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, pattern: str, seconds: float = 180) -> str:
        """What is on screen up to `pattern`, without colours."""
        deadline = time.monotonic() + seconds
        screen = ""
        while not re.search(pattern, screen):
            left = deadline - time.monotonic()
            assert left > 0, f"{pattern!r} never appeared in:\n{screen}"
            if select.select([self._master], [], [], left)[0]:
                try:
                    data = os.read(self._master, 65536).decode(errors="replace")
                except OSError:
                    pytest.fail(f"it ended before {pattern!r} appeared:\n{screen}")
                screen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data)
        return screen


@pytest.fixture
def menu(tmp_path: Path) -> Iterator[Terminal]:
    if os.geteuid() != 0:
        pytest.skip("needs root: the daemon of the menu runs as root")
    socket = str(tmp_path / "daemon.sock")
    with Terminal(sys.executable, "python/menu.py", socket) as terminal:
        yield terminal


def test_the_menu_shows_the_state_and_starts_asks_and_stops_the_daemon(menu: Terminal) -> None:
    screen = menu.read_until("> $")
    assert re.search(r"daemon +not running", screen)
    assert re.search(r"module +(not loaded|loaded)", screen)
    assert "x  stop the daemon (not running)" in screen
    menu.type("x\r")
    menu.read_until(r"stop the daemon: not running(.|\n)*looks again\)\r?\n> $")

    menu.type("s\r")
    screen = menu.read_until(r"started(.|\n)*looks again\)\r?\n> $")
    [pid] = set(re.findall(r"daemon +pid (\d+), engine (?:packet|ebpf|module)", screen))
    try:
        assert re.search(r"clients +0\b", screen)
        menu.type("c\r")
        assert f"pid {pid}" in menu.read_until(AFTER)
        menu.type("h\r")
        menu.read_until(r"\$ .*hunter(.|\n)*Ctrl-C ends")
        menu.type("\x03")
        menu.read_until(AFTER)
        menu.type("x\r")
        screen = menu.read_until(AFTER)
        assert f"kill {pid}" in screen and re.search(r"daemon +not running", screen)
    finally:
        end(int(pid))
    menu.type("q\r")
    assert menu.process.wait(30) == 0


def test_the_menu_names_a_wrong_key_and_ends_with_the_terminal(menu: Terminal) -> None:
    menu.read_until("> $")
    menu.type("z\r")
    menu.read_until(r"no key of this menu(.|\n)*> $")
    menu.type("\x04")
    assert menu.process.wait(30) == 0


def test_without_a_terminal_the_menu_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "python/menu.py"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2
    assert "needs a terminal" in done.stderr


def end(pid: int) -> None:
    """Waits until that daemon has ended; its parent may not have looked yet."""
    for _ in range(150):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except FileNotFoundError:
            return
        time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the daemon did not end when it was told to")
