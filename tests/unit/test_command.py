# SPDX-License-Identifier: MIT
"""The command after "--": which processes are its own, however short-lived; its exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hunter.child.command import Command, as_invoker
from hunter.child.forks import Forks
from nlproto.host.procfs import TICK_NS
from nlproto.tables.processes import Process, Processes
from recording import make_records
from waiting import until

WHO = "import os, sys; open(sys.argv[1], 'a').write(open('/proc/self/stat').read())"
"""A process that writes who it is and is gone."""


@pytest.fixture
def forks_are_told() -> None:
    try:
        Forks().close()
    except OSError as error:
        pytest.skip(f"perf events are refused here: {error}")


def end(command: Any) -> Any:
    until(lambda: command.ended)
    return command.exit_code


def written(path: Any) -> Any:
    """(pid, start_ns) of each that wrote itself down."""
    found = []
    for line in path.read_text().splitlines():
        pid, rest = line.split(" ", 1)
        found.append((int(pid), int(rest.rpartition(")")[2].split()[19]) * TICK_NS))
    return found


def identity(pid: int) -> tuple[Any, ...]:
    with open(f"/proc/{pid}/stat") as file:
        return pid, int(file.read().rpartition(")")[2].split()[19]) * TICK_NS


@pytest.fixture(autouse=True)
def no_child_is_left() -> Iterator[None]:
    """Orphans came to us: other tests look at this process's children."""
    yield
    for child in _children():
        os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        until(lambda: os.waitpid(-1, os.WNOHANG)[0] < 0)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


@pytest.fixture
def own() -> Any:
    def ask(command: Any, processes: Any, details: Any = None) -> Any:
        records = make_records(*({"tgid": pid, "start_ns": start} for pid, start in processes))
        return command.own(records, details or Processes()).tolist()

    return ask


@pytest.mark.parametrize(
    "script",
    [
        "{who}",
        "({who}); true",
        "( ( ( {who} & ) & ) & )",
        "setsid -f sh -c '( ( {who} & ) & )'",
        "for i in 1 2 3; do ( {who} ) & done; wait",
    ],
)
def test_descendants_are_own_when_they_and_their_parents_are_gone(
    script: str, own: Any, tmp_path: Path, forks_are_told: None
) -> None:
    path = tmp_path / "who"
    (tmp_path / "who.sh").write_text(f'{sys.executable} -c "{WHO}" {path}\n')
    command = Command(["sh", "-c", script.format(who=f"sh {tmp_path}/who.sh")], print)
    assert end(command) == 0
    until(lambda: path.exists() and path.read_text().endswith("\n"))
    found = written(path)
    assert own(command, found) == [True] * len(found)
    command.close()


def test_others_are_not_own_nor_who_had_the_pid_before(own: Any, forks_are_told: None) -> None:
    command = Command(["sleep", "20"], print)
    pid = command._process.pid
    with subprocess.Popen(["sleep", "20"]) as other:
        # started by us too, and after the command
        asked = [identity(other.pid), identity(os.getpid()), identity(os.getppid()), identity(1)]
        assert own(command, asked) == [False] * 4
        other.kill()
    start = identity(pid)[1]
    assert own(command, [(pid, start), (pid, start - 5 * 10**9)]) == [True, False]
    command.end()
    command.close()


def test_without_the_kernels_word_the_living_are_known_by_their_parents(
    own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("hunter.child.command.Forks.__init__", refused)
    told: list[Any] = []
    path = tmp_path / "pid"
    script = f"setsid -f sh -c 'echo $$ > {path}.new; mv {path}.new {path}; sleep 20; true'"
    command = Command(["sh", "-c", script + "; sleep 20"], told.append)
    assert "does not report forks" in told[0]
    until(path.exists)
    pid = int(path.read_text())
    details = Processes()  # of those that have ended, who started them is all that is known
    details.restore([Process(4_000_000, 7, ppid=pid), Process(4_000_001, 7, ppid=1)])
    asked = [identity(pid), (4_000_000, 7), (4_000_001, 7), (4_000_002, 7), identity(os.getpid())]
    assert own(command, asked, details) == [True, True, False, False, False]
    os.killpg(pid, 9)
    command.end()
    command.close()


def test_unnamed_records_are_not_own() -> None:
    command = Command(["true"], print)
    records = make_records({"tgid": 0, "start_ns": 0, "how": 19})
    assert command.own(records, Processes()).tolist() == [False]
    end(command)
    command.close()


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -9 $$", 137), ("true", 0)])
def test_its_exit_code_is_as_a_shell_tells_it(script: str, code: int) -> None:
    told: list[Any] = []
    command = Command(["sh", "-c", script], told.append)
    assert end(command) == code
    command.end()
    assert ("ended with" in str(told)) == bool(code)
    command.close()


def test_orphans_are_reaped(forks_are_told: None) -> None:
    command = Command(["sh", "-c", "(sleep 0.1 & ) ; sleep 1"], print)
    end(command)
    zombies = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "stat=,comm="], capture_output=True, text=True
    ).stdout
    assert "sleep <defunct>" not in zombies
    command.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
def test_under_sudo_the_command_is_the_users() -> None:
    environ = {
        "SUDO_UID": "65534",
        "SUDO_GID": "65534",
        "SUDO_USER": "x",
        "PATH": os.environ["PATH"],
    }
    script = "id -u; id -g; id -G; echo $HOME $USER ${SUDO_UID-none}"
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, **as_invoker(environ)
    )
    uid, gid, groups, rest = done.stdout.splitlines()
    assert (uid, gid, groups.split()[0]) == ("65534", "65534", "65534")
    assert rest.endswith("none") and "/root" not in rest
    assert as_invoker({"SUDO_UID": "0", "SUDO_GID": "0"}) == {} == as_invoker({})


def test_the_command_gets_the_environment_as_it_was(tmp_path: Path) -> None:
    """NumPy's library is told to start no threads; the command's may start its own."""
    seen = tmp_path / "environment"
    program = f"""
import sys
from hunter.child.command import Command
command = Command(["sh", "-c", "env >{seen}"], print, follow=False)
while not command.ended:
    pass
"""
    environment = {
        name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"
    }
    environment["PYTHONPATH"] = "python"
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert "OPENBLAS_NUM_THREADS=" not in seen.read_text()
