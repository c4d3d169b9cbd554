# SPDX-License-Identifier: MIT
"""README.md's blocks, pasted one at a time and in order (root).

The tree is a copy, /etc, /run and /usr/local/bin are this test's own; what is set up before
(packages, .venv) is there already, and tests/packages/test_bare.py tries it on a bare Debian.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from readme import README, blocks  # noqa: E402

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts, and engine packet")

ELSEWHERE = {
    "./build.sh --no-module": "test_bare.py; here it would touch .venv",
    "./build.sh && sudo insmod kmod/sniffer.ko": "tests/vagrant/session.sh",
    "make run": "test_bare.py, tests/vagrant/session.sh",
    "make test": "this is it",
}
"""Lines that are not run here, and where they are."""

SUDO = """\
#!/bin/sh
# what sudo does for root
export SUDO_UID=0 SUDO_GID=0 SUDO_USER=root
[ "$1" != -b ] || { shift; setsid "$@" >/dev/null 2>&1 & exit 0; }
exec "$@"
"""


def is_endless(line: str) -> bool:
    """Whether it shows until somebody ends it."""
    words = line.split()
    shows = words[:2] == ["sudo", "packet-hunter"]
    return shows and not {"--duration", "--", "doctor", "-c"} & set(words)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Any]:
    """Run a line as bash does, on a terminal when asked; a machine of its own to change."""
    tree = tmp_path / "tree"
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    (tree / ".venv").symlink_to(ROOT / ".venv")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sudo").write_text(SUDO)
    (tmp_path / "bin/sudo").chmod(0o755)
    (tmp_path / "bin/apt-get").write_text("#!/bin/sh\n")  # what it installs is there
    (tmp_path / "bin/apt-get").chmod(0o755)
    (tmp_path / "work").mkdir()
    layers = f"lowerdir=/usr/local/bin,upperdir={tmp_path}/bin,workdir={tmp_path}/work"
    script = f"""
    cp -a /etc {tmp_path}/etc && mount --bind {tmp_path}/etc /etc &&
    mount -t tmpfs tmpfs /run && mount -t overlay -o {layers} bin /usr/local/bin && sleep infinity
    """
    holder = subprocess.Popen(
        [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-c",
            script,
        ]
    )
    inside = None
    until = time.monotonic() + 60
    while inside is None:
        assert holder.poll() is None and time.monotonic() < until
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        found = (
            children.read_text().split()
            if children.exists()
            else subprocess.run(
                ["ps", "--ppid", str(holder.pid), "-o", "pid="], capture_output=True, text=True
            ).stdout.split()
        )
        if found and "/usr/local/bin" in Path(f"/proc/{found[0]}/mounts").read_text():
            inside = found[0]
        time.sleep(0.05)
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environment = {
        "PATH": path,
        "HOME": "/root",
        "USER": "root",
        "TERM": "xterm",
        "LANG": "C.UTF-8",
    }
    enter = ["nsenter", "--target", inside, "--mount", "--pid", "bash", "-c"]

    def run(line: Any, terminal: Any = None) -> Any:
        return subprocess.Popen(
            [*enter, f"cd {tree} && {line}"],
            stdin=terminal if terminal is not None else subprocess.DEVNULL,
            stdout=terminal if terminal is not None else subprocess.PIPE,
            stderr=terminal if terminal is not None else subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    yield run
    holder.kill()
    holder.wait()


def until_it_shows(process: Any, master: Any) -> Any:
    """Read the terminal until the program is at work."""
    screen = ""
    give_up = time.monotonic() + 120
    while "Ctrl-C ends" not in screen and "q Quit" not in screen and "process" not in screen:
        assert process.poll() is None and time.monotonic() < give_up, screen
        if select.select([master], [], [], 1)[0]:
            screen += os.read(master, 65536).decode(errors="replace")
    return screen


def run_endless(shell: Any, line: Any) -> Any:
    master, slave = os.openpty()
    process = shell(line, slave)
    os.close(slave)
    try:
        until_it_shows(process, master)
        os.write(master, b"q")  # for top
        for one in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "top" not in line and "hunter" in one.cmdline():
                    one.send_signal(signal.SIGINT)
        give_up = time.monotonic() + 120
        while process.poll() is None:
            assert time.monotonic() < give_up
            if select.select([master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the other end is closed
                    os.read(master, 65536)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(master)
    return process.returncode


@pytest.fixture
def traffic() -> Iterator[None]:
    """What there is on any machine that somebody wants to look at."""
    script = ROOT / "tests" / "loopback_traffic.py"
    process = subprocess.Popen([sys.executable, script, "600"])
    yield
    process.kill()
    process.wait()


def test_each_block_can_be_pasted(shell: Any, traffic: None) -> None:
    for block in blocks():
        for line in block:
            if line in ELSEWHERE:
                continue
            if is_endless(line):
                assert len(block) == 1, f"what follows {line!r} never runs"
                assert run_endless(shell, line) == 0, line
                continue
            process = shell(line)
            output = process.communicate(timeout=300)[0].decode()
            expected = 124 if " timeout " in line else 0
            if "who" in line.split() and output.startswith("no"):
                expected = 1  # as grep: nobody has asked a name server here
            assert process.returncode == expected, f"{line}\n{output}"
            if "packet-hunterd" in line and "-b" in line.split():
                wait_for_daemon(shell)


def wait_for_daemon(shell: Any) -> None:
    until = time.monotonic() + 60
    while True:
        process = shell("packet-hunter stats --socket /run/packet-hunter/daemon.sock")
        output = process.communicate(timeout=60)[0].decode()
        if process.returncode == 0:
            return
        assert time.monotonic() < until, output


def test_no_command_of_the_text_is_without_its_program() -> None:
    """Words in the text that look like commands begin with something that the reader has."""
    text = README.read_text()
    commands = re.findall(r"`((?:sudo |make |packet-hunter |vagrant )[^`]*)`", text)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands:
        if command.startswith("make "):
            assert command.split()[1] in targets, command
