# SPDX-License-Identifier: MIT
"""Control groups for a trial, as a service manager divides a machine.

Services and users have half of the processors each, however many processes they have; the users
have equal parts. The trial as a whole goes before what else runs here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["Slices"]

_ROOT = Path("/sys/fs/cgroup")
_WHOLE = 20  # times the weight of a group that is not told; with more, kernel threads would starve
_REALTIME = 900_000  # us of each second, where version 1 divides real time: nearly all of it


class Slices:
    """A context manager: "system", and a part of "users" for each user named.

    `memory`: bytes that "system" may use. Where no control group can be made everything runs as it
    is (`made`).
    """

    def __init__(self, *users: str, memory: int | None = None) -> None:
        self._users = users
        self._memory = memory
        self._folders: list[Path] = []
        self._homes: dict[Path, Path] = {}
        self.made = False

    def __enter__(self) -> Slices:
        try:
            self._make()
            self.made = True
        except OSError:
            self.__exit__()
        return self

    def __exit__(self, *_: object) -> None:
        for folder in reversed(self._folders):
            with contextlib.suppress(OSError):
                if (folder / "cpu.rt_runtime_us").exists():  # or the next trial gets none at once
                    (folder / "cpu.rt_runtime_us").write_text("0")
                folder.rmdir()
        self._folders.clear()

    def _make(self) -> None:
        whole = f"packet-hunter-{os.getpid()}"
        unified = (_ROOT / "cgroup.controllers").exists()
        home = _ROOT if unified else _ROOT / "cpu"
        top = self._folder(home / whole, home)
        system, users = (self._folder(top / name, home) for name in ("system", "users"))
        parts = [self._folder(users / name, home) for name in self._users]
        if unified:
            for folder in (_ROOT, top, users):
                (folder / "cgroup.subtree_control").write_text("+cpu +memory")
            (top / "cpu.weight").write_text(str(100 * _WHOLE))
            if self._memory:
                (system / "memory.max").write_text(str(self._memory))
            return
        (top / "cpu.shares").write_text(str(1024 * _WHOLE))
        for part in (system, users, *parts):
            (part / "cpu.shares").write_text("1024")
        if (top / "cpu.rt_runtime_us").exists():
            for folder in (top, system):
                (folder / "cpu.rt_runtime_us").write_text(str(_REALTIME))
        if self._memory:
            own = _ROOT / "memory" / _own("memory")
            above = self._folder(own / whole, own)
            folder = self._folder(above / "system", own)
            (folder / "memory.limit_in_bytes").write_text(str(self._memory))

    def _folder(self, path: Path, home: Path) -> Path:
        path.mkdir()
        self._folders.append(path)
        self._homes[path] = home
        return path

    def entering(self, name: str) -> Callable[[], None]:
        """What puts the process that calls it into a part; for preexec_fn."""

        def enter() -> None:
            for folder in self._folders:
                if folder.name == name:
                    (folder / "cgroup.procs").write_text(str(os.getpid()))

        return enter

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """This process, for a while."""
        self.entering(name)()
        try:
            yield
        finally:
            for folder in self._folders:
                if folder.name == name:
                    (self._homes[folder] / "cgroup.procs").write_text(str(os.getpid()))


def _own(controller: str) -> str:
    for line in Path("/proc/self/cgroup").read_text().split("\n"):
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controller in controllers.split(","):
            return path.strip("/")
    return ""
