# SPDX-License-Identifier: MIT
"""Which network namespaces are captured: opened and closed beside the thread that reads them.

Opening one takes some 20 ms and closing one 50 ms: the kernel waits for all its processors. So
neither may hold up who reads, starts or stops. Users can make namespaces without end: the places
are bounded, root's come first, and other users share the rest evenly.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from nlproto.errors import Error, NoPrivilege
from nlproto.host import netns, procfs
from nlproto.running.supervise import Failures

__all__ = ["CapturedNamespaces"]

_LOOK = 0.25  # s between two looks for namespaces that came or went
_LOOK_SHARE = 50  # and at least this many times what the last one took
_PATIENCE = 0.5  # s that a start waits for all of them
_MANY = 32  # for which it does not wait at all
_CLOSERS = 64  # threads: the waits of the kernel for its processors overlap
_TELL = 60.0  # s between two messages of one kind


class OpenNamespace(Protocol):
    """What is open in one namespace."""

    def close(self) -> None:
        """Give back what is open in it; may take 50 ms."""
        ...


P = TypeVar("P", bound=OpenNamespace)


class CapturedNamespaces(Generic[P]):
    """Calls `make(inode, path, ours)` for each namespace but `own`, in a thread of its own.

    `ours`: whether it belongs to our own user namespace, or root's. The reader asks for
    changes() and gives back what it does not use any more.
    """

    def __init__(
        self,
        make: Callable[[int, Path, bool], P],
        own: int,
        notify: Callable[[str], None],
        proc: Path = procfs.PROC,
    ) -> None:
        self._make = make
        self._own = own
        self._notify = notify
        self._proc = proc
        self._owners: dict[int, int | None] = {own: None}
        self._open: dict[int, P] = {}
        self._refused: set[int] = set()
        self._told: dict[str, float] = {}
        self._failures = Failures("network namespaces")
        self._changes: deque[tuple[int, P | None]] = deque()
        self._unused: deque[P] = deque()
        self._anew: deque[int] = deque()
        self._stopping = threading.Event()
        self._complete = threading.Event()
        self._found = 0
        self._thread = threading.Thread(target=self._run, name="namespaces", daemon=True)

    def start(self) -> None:
        """Begin; return when all namespaces are open, or soon if they are many."""
        self._thread.start()
        self._complete.wait(_PATIENCE)

    @property
    def left_out(self) -> int:
        """Namespaces that are not captured, or not yet."""
        return max(0, self._found - len(self._open))

    def changes(self) -> Iterator[tuple[int, P | None]]:
        """What was opened, and None for what is to be given back, since the last call."""
        while self._changes:
            yield self._changes.popleft()

    def owner(self, inode: int) -> int | None:
        """Return the uid whose a namespace is, 0 for ours and root's; None: not known."""
        uid = self._owners.get(inode, netns.UNKNOWN_OWNER)
        return None if uid == netns.UNKNOWN_OWNER else uid or 0

    def renew(self, inode: int) -> None:
        """Let it be opened once more; changes() then has it, and the reader gives the old back."""
        self._anew.append(inode)

    def give_back(self, place: P) -> None:
        """Let it be closed."""
        self._unused.append(place)

    def close(self, others: Iterable[P] = ()) -> None:
        """End the thread; close everything, `others` too."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        waiting = {id(p): p for p in (*self._open.values(), *self._unused, *others)}
        self._open.clear()
        self._unused.clear()
        _close(waiting.values())

    def _run(self) -> None:
        while not self._stopping.is_set():
            pause = _LOOK
            try:
                pause = self._look()
            except NoPrivilege as error:
                self._notify(f"only this network namespace is captured: {error}")
                return
            except Exception as error:  # those that are open go on
                self._failures.add(error)
            finally:
                self._complete.set()
            self._stopping.wait(pause)

    def _look(self) -> float:
        """Open what came and has a place, drop what nobody uses any more but ourselves.

        Returns how long (s) to wait before the next look.
        """
        _close([self._unused.popleft() for _ in range(len(self._unused))])
        began = time.monotonic()
        found = netns.paths(self._proc)
        pause = max(_LOOK, _LOOK_SHARE * (time.monotonic() - began))
        found.pop(self._own, None)
        self._owners = {
            inode: self._owners[inode]
            if inode in self._owners
            else netns.owner_or_unknown(path, self._proc)
            for inode, path in found.items()
        }
        limit = netns.room()
        chosen = netns.choose(self._owners, self._open, limit)
        for inode in [one for one in self._open if one not in chosen]:
            self._open.pop(inode)
            self._changes.append((inode, None))
        self._refused &= found.keys()
        self._found = len(found)
        if len(found) > len(chosen):
            self._tell(
                "limit",
                f"{len(found) - len(chosen)} of {len(found) + 1} network namespaces are not"
                f" captured: there are places for {limit} others{_way_out(limit)}",
            )
        if len(chosen - self._open.keys()) > _MANY:
            self._complete.set()
        for inode in chosen:
            if self._stopping.is_set():
                break
            if inode not in self._open and inode not in self._refused:
                self._try(inode, found[inode])
        for inode in {self._anew.popleft() for _ in range(len(self._anew))}:
            if inode in self._open and inode in found:
                self._try(inode, found[inode])
        return pause

    def _try(self, inode: int, path: Path) -> None:
        try:
            place = self._make(inode, path, not self._owners[inode])
        except FileNotFoundError:
            return
        except NoPrivilege:
            raise
        except (Error, OSError) as error:
            self._refused.add(inode)
            self._tell("refused", f"network namespace {inode} is not captured: {error}")
            return
        self._open[inode] = place
        self._changes.append((inode, place))

    def _tell(self, kind: str, text: str) -> None:
        now = time.monotonic()
        if kind not in self._told or now - self._told[kind] >= _TELL:
            self._told[kind] = now
            self._notify(text)


def _way_out(limit: int) -> str:
    return "" if limit >= netns.MAX_OTHERS else "; more open files allow more (ulimit -n)"


def _close(places: Iterable[OpenNamespace]) -> None:
    waiting = list(places)
    if len(waiting) < 3:
        for place in waiting:
            place.close()
        return
    with ThreadPoolExecutor(min(_CLOSERS, len(waiting)), "closer") as pool:
        list(pool.map(lambda place: place.close(), waiting))
