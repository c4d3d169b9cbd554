# SPDX-License-Identifier: MIT
"""Starts the command after "--" as its user, knows its descendants, and keeps its exit code."""

from __future__ import annotations

import ctypes
import os
import pwd
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hunter.child.forks import Forks
from hunter.show.columns import Details
from nlproto import Error
from nlproto.host.procfs import TICK_NS, same_start
from nlproto.records import wire
from nlproto.running.descriptors import lower_limit
from nlproto.tables.processes import Process

__all__ = ["Command", "as_invoker"]

_PR_SET_CHILD_SUBREAPER = 36
_MAX_VERDICTS = 65536

Notify = Callable[[str], None]


def as_invoker(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return subprocess.Popen's options for the command, which runs as the user behind sudo.

    To run it as root, write `-- sudo CMD`.
    """
    uid, gid = environ.get("SUDO_UID", ""), environ.get("SUDO_GID", "")
    if os.geteuid() != 0 or not (uid.isdigit() and gid.isdigit()) or int(uid) == 0:
        return {}
    environment = {name: value for name, value in environ.items() if not name.startswith("SUDO_")}
    groups = [int(gid)]
    try:
        user = pwd.getpwuid(int(uid))
    except KeyError:
        pass
    else:
        groups = os.getgrouplist(user.pw_name, int(gid))
        environment |= {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}
    return {"user": int(uid), "group": int(gid), "extra_groups": groups, "env": environment}


class NotStarted(Error):
    """Return env(1)'s and sudo(8)'s exit code: 127, no such program; 126, it cannot run."""

    def __init__(self, program: str, error: Exception) -> None:
        absent = isinstance(error, FileNotFoundError)
        self.exit_code = 127 if absent else 126
        reason = getattr(error, "strerror", None) or error
        # the error of a script without its interpreter looks as if the script did not exist
        there = absent and os.path.sep in program and os.path.exists(program)
        help = "; is its interpreter installed?" if there else "; is it installed?"
        super().__init__(f"cannot run {program or repr(program)}: {reason}{help if absent else ''}")


class Command:
    """A running command. For the thread that started it.

    The kernel reports each fork below it. Forks of a setuid program are not reported; where
    perf events are refused none are. Such forks are found from the parents of living processes.
    Raises Error if it cannot be started.
    """

    def __init__(self, argv: Sequence[str], notify: Notify, follow: bool = True) -> None:
        self._notify = notify
        self._forks: Forks | None = None
        self._verdicts: dict[tuple[int, int], bool] = {}
        self._pidns = os.stat("/proc/self/ns/pid").st_ino
        if follow:
            # orphans become our children, so that each living descendant leads to us
            _adopt_orphans(True)
            try:
                self._forks = Forks()
            except OSError as error:
                notify(
                    f"the kernel does not report forks ({error.strerror or error}): packets of"
                    " children that end at once can be missing"
                )
        try:
            options = {"env": os.environ, **as_invoker(os.environ)}
            self._process = subprocess.Popen(argv, preexec_fn=lower_limit, **options)
        except (OSError, subprocess.SubprocessError) as error:
            self.close()
            raise NotStarted(argv[0], error) from None

    def close(self) -> None:
        _adopt_orphans(False)
        if self._forks is not None:
            self._forks.close()

    @property
    def ended(self) -> bool:
        """Return whether it has ended. Reaps orphans that have ended."""
        if self._forks is not None:
            self._forks.read()
        if self._process.poll() is not None:
            return True
        self._reap()
        return False

    @property
    def exit_code(self) -> int:
        """Exit code as a shell reports it: 128 + N if signal N ended it. Only after its end."""
        code = int(self._process.returncode)
        return code if code >= 0 else 128 - code

    def end(self) -> None:
        """End it if it runs; otherwise say how it ended."""
        if self._forks is not None and not self._forks.complete:
            self._notify("forks came faster than they were read: some children's packets may miss")
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(3)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        elif self._process.returncode:
            what = f"exit code {self._process.returncode}"
            if self._process.returncode < 0:
                what = f"signal {-self._process.returncode}"
            self._notify(f"the command ended with {what}")

    def _reap(self) -> None:
        """Reap orphans that came to us. Our other children have their own waiters."""
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None or not self._is_orphan(found.si_pid):
                return
            os.waitpid(found.si_pid, 0)

    def _is_orphan(self, pid: int) -> bool:
        if pid == self._process.pid or self._forks is None:
            return False
        fork = self._forks.before(pid, 1 << 63)
        return fork is not None and fork[1] != os.getpid()

    # Whose records

    def own(self, records: np.ndarray, details: Details) -> np.ndarray:
        """Return which RECORDs are of the command or a descendant, one bool each."""
        if self._forks is not None:
            self._forks.read()
        result = np.zeros(len(records), bool)
        named = np.flatnonzero(wire.are_named(records["how"]))
        if not len(named):
            return result
        keys = np.empty(len(named), [("tgid", "u8"), ("start", "u8")])
        keys["tgid"], keys["start"] = records["tgid"][named], records["start_ns"][named]
        distinct, belongs = np.unique(keys, return_inverse=True)
        verdicts = [self._is_own(tgid, start, details) for tgid, start in distinct.tolist()]
        result[named] = np.array(verdicts)[belongs]
        return result

    def _is_own(self, tgid: int, start_ns: int, details: Details) -> bool:
        key = (tgid, start_ns)
        if key not in self._verdicts:
            if len(self._verdicts) >= _MAX_VERDICTS:
                self._verdicts.clear()
            process = details.get(tgid, start_ns)
            inside = process is not None and process.pidns == self._pidns
            pid = process.ns_tgid if inside and process and process.ns_tgid else tgid
            self._verdicts[key] = self._forked(pid, start_ns) or self._below_us(
                pid, start_ns, process
            )
        return self._verdicts[key]

    def _forked(self, pid: int, start_ns: int) -> bool:
        """Return whether the reported forks lead from the process to the command."""
        if self._forks is None:
            return False
        fork = self._forks.of(pid, start_ns)
        while fork is not None and pid != self._process.pid:
            moment, pid = fork
            fork = self._forks.before(pid, moment)
        return fork is not None

    def _below_us(self, pid: int, start_ns: int, process: Process | None) -> bool:
        """Return whether living parents lead to us from the process, or from its old parent."""
        here = _stat(pid)
        if here is None or not same_start(start_ns, here[1]):
            if process is None or not process.ppid:
                return False
            pid = process.ppid
        while pid not in (0, os.getpid()):
            here = _stat(pid)
            if pid == self._process.pid:
                return True
            if here is None:
                return False
            parent, ticks = here
            if self._forked(pid, ticks * TICK_NS):
                return True
            if parent == os.getpid():
                return not self._started_by_us(pid, ticks * TICK_NS)
            pid = parent
        return False

    def _started_by_us(self, pid: int, start_ns: int) -> bool:
        """Return whether it is another child of ours, and not an orphan that came to us."""
        fork = self._forks.of(pid, start_ns) if self._forks is not None else None
        return fork is not None and fork[1] == os.getpid()


def _adopt_orphans(wanted: bool) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)


def _stat(pid: int) -> tuple[int, int] | None:
    """Return parent and start (ticks since boot) of a living process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return int(fields[1]), int(fields[19])
    except (OSError, IndexError):
        return None
