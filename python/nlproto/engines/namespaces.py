# SPDX-License-Identifier: MIT
"""Opens and closes the captured network namespaces, in a thread beside the one that reads them.

Opening one takes some 20 ms and closing one 50 ms, because the kernel waits for all processors.
This must not delay reading, starting or stopping. Users can make any number of namespaces. So the
places are bounded: root's namespaces come first, and other users share the rest evenly.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from nlproto.errors import Error, NoPrivilege
from nlproto.host import netns, procfs
from nlproto.running.supervise import Failures

__all__ = ["CapturedNamespaces"]

_LOOK = 0.25  # s between two looks for new and gone namespaces
_LOOK_SHARE = 50  # and at least this many times the duration of the last look
_PATIENCE = 0.5  # s that a start waits until all are open
_MANY = 32  # with more namespaces a start does not wait
_OPENERS, _CLOSERS = 8, 64  # threads: waits for all processors can overlap
_FEW = 3  # namespaces for which none are started
_AGAIN = 30.0  # s to the next try where one could not be opened, as for lack of memory
_TELL = 60.0  # s between two messages of one kind


class OpenNamespace(Protocol):
    """What is open in one namespace."""

    def close(self) -> None:
        """Close it; may take 50 ms."""
        ...


P = TypeVar("P", bound=OpenNamespace)
T = TypeVar("T")


class CapturedNamespaces(Generic[P]):
    """Calls `make(inode, path, ours)` for each namespace but `own`, in threads of its own.

    `ours`: whether it belongs to our own user namespace, or root's. The reader calls changes(), and
    closes what it no longer uses. `changed` is called when there are some, in the same threads.
    """

    def __init__(
        self,
        make: Callable[[int, Path, bool], P],
        own: int,
        notify: Callable[[str], None],
        proc: Path = procfs.PROC,
        finder: netns.Finder | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._make = make
        self._own = own
        self._notify = notify
        self._proc = proc
        self._changed = changed
        self._finder = netns.Finder(proc) if finder is None else finder
        self._owns_finder = finder is None
        self._owners: dict[int, int | None] = {own: None}
        self._open: dict[int, P] = {}
        self._refused: dict[int, float] = {}
        """Namespaces that could not be opened, and when each is tried again."""
        self._told: dict[str, float] = {}
        self._failures = Failures("network namespaces")
        self._changes: deque[tuple[int, P | None]] = deque()
        self._unused: deque[P] = deque()
        self._anew: deque[int] = deque()
        self._stopping = threading.Event()
        self._complete = threading.Event()
        self._found = 0
        self._thread = threading.Thread(target=self._run, name="namespaces", daemon=True)

    def start(self, patience: float = _PATIENCE) -> None:
        """Begin. Returns when all namespaces are open, after `patience` s, or soon if many are."""
        self._thread.start()
        self._complete.wait(patience)

    @property
    def left_out(self) -> int:
        """How many namespaces are not captured, or not yet."""
        return max(0, self._found - len(self._open))

    def changes(self) -> Iterator[tuple[int, P | None]]:
        """Return what was opened since the last call, and None for what must be closed."""
        while self._changes:
            yield self._changes.popleft()

    def owner(self, inode: int) -> int | None:
        """Return the uid that owns a namespace; 0 for ours and root's; None: not known."""
        uid = self._owners.get(inode, netns.UNKNOWN_OWNER)
        return None if uid == netns.UNKNOWN_OWNER else uid or 0

    def renew(self, inode: int) -> None:
        """Have it opened once more. changes() then has it, and the reader closes the old one."""
        self._anew.append(inode)

    def give_back(self, place: P) -> None:
        """Have it closed."""
        self._unused.append(place)

    def close(self, others: Iterable[P] = ()) -> None:
        """End the thread and close everything, `others` too."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._owns_finder:
            self._finder.close()
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
            except Exception as error:  # open ones stay open
                self._failures.add(error)
            finally:
                self._complete.set()
            self._stopping.wait(pause)

    def _look(self) -> float:
        """Open new namespaces that have a place, and drop those that only we still use.

        Returns the time in s to the next look.
        """
        _close([self._unused.popleft() for _ in range(len(self._unused))])
        began = time.monotonic()
        found = self._finder.paths()
        pause = max(_LOOK, _LOOK_SHARE * (time.monotonic() - began))
        found.pop(self._own, None)
        self._owners = {
            inode: owner
            if (owner := self._owners.get(inode, netns.UNKNOWN_OWNER)) != netns.UNKNOWN_OWNER
            else netns.owner_or_unknown(path, inode, self._proc)
            for inode, path in found.items()
        }
        limit = netns.room()
        chosen = netns.choose(self._owners, self._open, limit)
        for inode in [one for one in self._open if one not in chosen]:
            self._open.pop(inode)
            self._changes.append((inode, None))
            self._changed()
        now = time.monotonic()
        self._refused = {one: at for one, at in self._refused.items() if one in found}
        self._found = len(found)
        if len(found) > len(chosen):
            self._tell(
                "limit",
                f"{len(found) - len(chosen)} of {len(found) + 1} network namespaces are not"
                f" captured: there are places for {limit} others{_way_out(limit)}",
            )
        if len(chosen - self._open.keys()) > _MANY:
            self._complete.set()
        missing = [inode for inode in chosen if inode not in self._open]
        wanted = [inode for inode in missing if self._refused.get(inode, now) <= now]
        anew = {self._anew.popleft() for _ in range(len(self._anew))}
        wanted += [inode for inode in anew if inode in self._open and inode in found]
        ours = [inode for inode in wanted if not self._owners[inode]]
        _for_each(lambda inode: self._try(inode, found[inode]), ours, _OPENERS)
        for inode in wanted:  # users' one by one: they can make many, and this takes CPU time
            if self._owners[inode]:
                self._try(inode, found[inode])
        return pause

    def _try(self, inode: int, path: Path) -> None:
        if self._stopping.is_set():
            return
        try:
            place = self._make(inode, path, not self._owners[inode])
        except FileNotFoundError:
            return
        except NoPrivilege:
            raise
        except (Error, OSError) as error:
            self._refused[inode] = time.monotonic() + _AGAIN
            self._tell("refused", f"network namespace {inode} is not captured: {error}")
            return
        self._open[inode] = place
        self._changes.append((inode, place))
        self._changed()

    def _tell(self, kind: str, text: str) -> None:
        now = time.monotonic()
        if kind not in self._told or now - self._told[kind] >= _TELL:
            self._told[kind] = now
            self._notify(text)


def _way_out(limit: int) -> str:
    return "" if limit >= netns.MAX_OTHERS else "; more open files allow more (ulimit -n)"


def _close(places: Iterable[OpenNamespace]) -> None:
    _for_each(lambda place: place.close(), list(places), _CLOSERS)


def _for_each(work: Callable[[T], None], things: Sequence[T], threads: int) -> None:
    """Do `work` on each. Raises what the first one raises that fails."""
    if len(things) < _FEW:
        for one in things:
            work(one)
        return
    with ThreadPoolExecutor(min(threads, len(things)), "namespace") as pool:
        list(pool.map(work, things))
