# SPDX-License-Identifier: MIT
"""Which processes hold a socket: inode -> descriptors under /proc/PID/fd, learnt step by step.

A full walk costs time in proportion to all descriptors of the machine. So full walks are
rationed. What is known is checked by one readlink, and newborn processes are asked first. So is
what the sockets of one user cost: a socket that only a message in flight refers to, or that
hundreds of processes have, is dear to look up and cheap to make.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from nlproto.errors import Error
from nlproto.host import procfs
from nlproto.host.procfs import Owner
from nlproto.running.budget import Budget, UserBudgets

__all__ = ["Holders"]

_WALK_SHARE = 4  # walks may take a quarter of the time in the long run
_WALK_SAVED_NS = 500_000_000  # walking time that can be saved up while nothing is unknown
_WALK_WAIT_S = 0.05  # for the walk of another thread, before nobody is found
_BESIDE_S = 0.3  # for a walk of one's own: whose ring is being read fills meanwhile
_USER_SHARE, _USERS_SHARE, _USER_SAVED_NS = 6, 4, 300_000_000
"""Parts of the time: for the sockets of one user, and of all users but root."""
_ASKING_NS = 20_000_000  # for who had sockets before; a walk of all is sooner done than more
_ASKED_AGAIN_NS = 50_000_000  # an inode that nobody held, when asked for again
_MISSING_LIMIT = 65536
_MANY = 500
_WALK_GAIN = 16  # a walk asks so many sockets in the time in which find() asks one
_GENERATIONS = 8
_BORN_NS = 10_000_000  # between two looks for new processes that nobody waits for
_BORN_SHARE = 10  # of the time, for these looks
_YOUNG_NS = 1_000_000_000  # how long one may be about to open its first socket
_FEW = 16
"""So many processes are asked at once, where the youngest are asked first."""
_AT_ONCE = 4
_INHERITED_NS = 200_000_000
"""How long it is remembered who may have got a socket by being born."""


class Holders:
    """The holders of sockets, as of their last check; for the threads of one program together.

    One thread at a time walks all processes. Others get answers meanwhile: none waits long for
    what another one reads in /proc.
    """

    def __init__(
        self,
        proc: Path = procfs.PROC,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._lock = threading.Lock()
        """Guards all tables here. /proc is read without it: who reads may have to wait."""
        self._walk_lock = threading.Lock()
        self._found = threading.local()
        self._proc = proc
        self._now_ns = now_ns
        self._by_inode: dict[int, dict[int, int]] = {}
        self._known: set[int] = set()
        self._young: dict[int, int] = {}
        self._sole: dict[int, int] = {}
        self._listed_ns = 0
        self._talkers: dict[int, None] = {}
        self._missing: dict[int, int] = {}
        self._settled: dict[int, int] = {}
        self._listing_ns = 0
        self._births = procfs.Births(proc)
        self._newest = self._births.last()
        self._inherited: dict[int, int] = {}
        self._welcoming = 0
        """Threads that ask the newly born at this moment."""
        self._unasked_ns = self._tidied_ns = 0
        self._budget = Budget(_WALK_SHARE, _WALK_SAVED_NS, now_ns)
        self._users = UserBudgets(_USER_SHARE, _USERS_SHARE, _USER_SAVED_NS, now_ns)
        self.walked_ns = -(1 << 62)
        """When all processes were last asked."""
        self.walk_took_ns = 0
        """How long that took."""
        self._beside: threading.Thread | None = None
        self._starting = threading.Lock()
        self._failed: Error | None = None
        self.complete = True
        """Whether every process could be asked at the last walk (else it needs root)."""

    def close(self) -> None:
        """Give back what is open. Answers still come, but the newly born are found later."""
        self._births.close()

    @property
    def exhaustive(self) -> bool:
        """Whether this thread's last find() that found nobody had asked every process."""
        return bool(getattr(self._found, "exhaustive", False))

    def walk(self) -> None:
        """Ask every process; the time it takes is missing for later ones (see due())."""
        with self._walk_lock, self._budget.spend():
            began = self.walked_ns = self._now_ns()
            by_inode: dict[int, dict[int, int]] = {}
            alive = procfs.pids(self._proc)
            sockets, complete = procfs.held_sockets(alive, self._proc)
            for inode, pid, fd in sockets.tolist():
                if inode in by_inode:
                    by_inode[inode][pid] = fd
                else:
                    by_inode[inode] = {pid: fd}
            with self._lock:
                self._learn(by_inode, alive)
                self.complete = complete
            self.walk_took_ns = self._now_ns() - began

    def walk_beside(self, wait_s: float = _BESIDE_S) -> bool:
        """As walk(), in a thread of its own; return whether that ended within `wait_s`.

        A busy machine takes seconds for it. Raises the Error of a walk that failed.
        """
        with self._starting:
            beside = self._beside
            if beside is None or not beside.is_alive():
                beside = self._beside = threading.Thread(
                    target=self._walk_apart, name="walk", daemon=True
                )
                beside.start()
        if wait_s:
            beside.join(wait_s)
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        return not beside.is_alive()

    def _walk_apart(self) -> None:
        try:
            self.walk()
        except Error as error:
            self._failed = error

    def _learn(self, by_inode: dict[int, dict[int, int]], alive: Sequence[int]) -> None:
        """Take what a walk found. Who was born since it began is asked once more."""
        self._by_inode = by_inode
        if not self._known.issuperset(alive):
            self._unasked_ns = self._now_ns()
        self._settled = {
            inode: pid
            for inode, held in by_inode.items()
            if (pid := next(iter(held)) if len(held) == 1 else self._settled.get(inode, 0)) in held
        }
        self._known = set(alive)
        self._talkers = {pid: None for held in by_inode.values() for pid in held}
        self._missing.clear()
        self._sole = {inode: pid for inode, held in by_inode.items() for pid in held}

    def due(self) -> bool:
        """Return whether a full walk may be made now, and nobody is making one."""
        return not self._walk_lock.locked() and self._budget.allows()

    def allows(self, uid: int) -> bool:
        """Return whether there is time left to look for who holds the sockets of `uid`."""
        return self._users.allows(uid)

    def find(self, inode: int, uid: int = 0) -> tuple[Owner, ...]:
        """Return the living holders of a socket, its likely user first; empty when none is found.

        That is who once held it alone, for as long as it does: children get descriptors by fork
        that they never use. Else the youngest, which was probably given it to use it. The time
        that this takes counts for `uid`, whose socket it is. Without any left nobody is found.
        """
        return self.find_soon(inode, uid) or self.find_anywhere(inode, uid)

    def find_many(
        self, inodes: Sequence[int], uids: Sequence[int]
    ) -> Iterator[tuple[int, tuple[Owner, ...]]]:
        """As find(), for each of `inodes`. When they are many each process is asked once."""
        many = len(inodes) > max(_MANY, len(self._by_inode) // _WALK_GAIN)
        if not many:
            asked = zip(inodes, uids, strict=True)
            yield from ((inode, self.find(inode, uid)) for inode, uid in asked)
            return
        yield from self.find_together(inodes)

    def find_together(self, inodes: Sequence[int]) -> Iterator[tuple[int, tuple[Owner, ...]]]:
        """As find(), for each of `inodes`: each process is asked once, if a walk is due."""
        if self.due():
            self.walk()
        else:
            self._ask_born(0)
        ask = functools.cache(functools.partial(procfs.owner, proc=self._proc))
        for inode in inodes:
            held = self._held(inode)
            if len(held) == 1:
                owner = ask(next(iter(held)))
                found: tuple[Owner, ...] = () if owner is None else (owner,)
            else:
                found = self._owners(inode, held, ask)
            yield inode, found

    def find_soon(self, inode: int, uid: int, likely: Sequence[int] = ()) -> tuple[Owner, ...]:
        """As find(), but ask only the newly born, then `likely`, then who had sockets before."""
        self._found.exhaustive = False
        if not inode or not self._users.allows(uid):
            return ()
        if not self._held(inode):
            with self._users.spend(uid):
                if found := self._find_newest(inode):
                    return found
        self._ask_born(max(_BORN_NS, _BORN_SHARE * self._listing_ns))
        with self._users.spend(uid):
            held = self._checked(inode)
            if not held and self._now_ns() >= self._missing.get(inode, 0):
                self._ask_some(inode, likely)
                held = self._checked(inode)
            if len(held) == 1:
                self._ask_parents(inode, *held)
                held = self._held(inode) or held
            return self._owners(inode, held)

    def find_anywhere(self, inode: int, uid: int = 0) -> tuple[Owner, ...]:
        """As find(), after find_soon() found nobody: ask all, if a walk is due."""
        if not inode:
            return ()
        if self._now_ns() < self._missing.get(inode, 0):
            self._found.exhaustive = self.complete
            return ()
        if not self._users.allows(uid):
            return ()
        self._wait_for_walk()
        if self.due():
            with self._users.spend(uid):
                ended = self.walk_beside()
            self._found.exhaustive = ended and self.complete
        with self._users.spend(uid):
            held = self._held(inode)
            if not held and self.exhaustive:
                with self._lock:
                    if len(self._missing) > _MISSING_LIMIT:
                        self._missing.clear()
                    self._missing[inode] = self._now_ns() + _ASKED_AGAIN_NS
            return self._owners(inode, held)

    def _wait_for_walk(self) -> None:
        """Another thread may be about to find whom we look for: wait, but not long."""
        if self._walk_lock.locked() and self._walk_lock.acquire(timeout=_WALK_WAIT_S):
            self._walk_lock.release()

    def known(self, inode: int) -> tuple[Owner, ...]:
        """As find(), but only of those that were known before; cheap."""
        return self._owners(inode, self._checked(inode))

    def peek(self, inode: int) -> Iterator[Owner]:
        """As known(), but nothing is learnt or forgotten."""
        holders = procfs.still_held(inode, self._held(inode), self._proc)
        yield from procfs.owners(tuple(holders), self._proc)

    def _held(self, inode: int) -> dict[int, int]:
        """Return who is known to hold it: {pid: descriptor}."""
        with self._lock:
            return self._by_inode.get(inode, {}).copy()

    def _owners(
        self,
        inode: int,
        held: Iterable[int],
        ask: Callable[[int], Owner | None] | None = None,
    ) -> tuple[Owner, ...]:
        if ask is None:
            owners = procfs.owners(tuple(held), self._proc)
        else:
            owners = [found for pid in held if (found := ask(pid)) is not None]
        with self._lock:
            for found in owners:
                self._talkers.pop(found.identity.tgid, None)
                self._talkers[found.identity.tgid] = None  # the last to have talked is asked first
            if len(owners) == 1:
                self._settled[inode] = owners[0].identity.tgid
            user = self._settled.get(inode)
        owners.sort(
            key=lambda one: (
                one.identity.tgid == user,
                one.identity.start_ticks,
                one.identity.tgid,
            ),
            reverse=True,
        )
        return tuple(owners)

    def _checked(self, inode: int) -> dict[int, int]:
        before = self._held(inode)
        held = procfs.still_held(inode, before, self._proc)
        with self._lock:
            known = self._by_inode.get(inode, {})
            for pid in before.keys() - held.keys():
                if known.get(pid) == before[pid]:
                    del known[pid]
        return held

    def _ask_born(self, older_ns: int) -> None:
        """Ask who was born since the last time: by fork they hold what their parents hold."""
        now = self._now_ns()
        if now - self._listed_ns < older_ns:
            return
        self._listed_ns = now
        alive = procfs.pids(self._proc)
        with self._lock:
            born = [pid for pid in alive if pid not in self._known]
            self._known = set(alive)
        self._listing_ns = self._now_ns() - now
        if len(born) < len(alive):
            self._welcome(born, now)
        else:  # the first look
            self._ask(born)

    def _find_newest(self, inode: int) -> tuple[Owner, ...]:
        """Ask the youngest, born since the last look or known already: one may live a millisecond.

        Each step is a tenth of one. Who they are is asked before who else holds it.
        """
        self._ask_newest()
        self._ask_young(inode, _FEW)
        ask = functools.cache(functools.partial(procfs.owner, proc=self._proc))
        held = [pid for pid in self._held(inode) if ask(pid)]
        if len(held) == 1:
            self._ask_parents(inode, *held)
        return self._owners(inode, self._held(inode) or held, ask) if held else ()

    def _ask_newest(self) -> None:
        """Ask the youngest of who was born since the last look, without the list of all."""
        newest, now = self._births.last(), self._now_ns()
        with self._lock:
            before, self._newest = self._newest, newest
            numbers = range(newest, before, -1)
            if before != newest and (not numbers or len(numbers) > _FEW):
                self._unasked_ns = now  # the list will tell of the others
            born = [pid for pid in numbers[:_FEW] if pid not in self._known]
        if not born:
            return
        self._welcome([pid for pid in born if procfs.is_process(pid)], now)

    def _welcome(self, born: Sequence[int], now: int) -> None:
        """Ask the newly born, and remember what they may have got from their parents."""
        with self._lock:
            self._known.update(born)
            self._young = {pid: at for pid, at in self._young.items() if now - at < _YOUNG_NS}
            self._young |= dict.fromkeys(sorted(born), now)
            self._welcoming += 1
        got: set[int] = set()
        try:
            got = self._ask(born)
        finally:
            with self._lock:
                self._welcoming -= 1
                self._inherited |= dict.fromkeys(got, now)
                if now - self._tidied_ns > _YOUNG_NS:
                    self._tidied_ns, recent = now, now - _INHERITED_NS
                    self._inherited = {
                        one: at for one, at in self._inherited.items() if at > recent
                    }

    def may_be_inherited(self, inode: int, since_ns: int) -> bool:
        """Return whether somebody was born since then, 0.2 s ago at most, who may hold it too.

        Also while another thread is asking those who were born.
        """
        self._ask_newest()
        with self._lock:
            told = max(self._inherited.get(inode, 0), self._unasked_ns)
            return self._welcoming > 0 or told > since_ns

    def _ask_young(self, inode: int, most: int) -> None:
        """Ask the youngest first, until one is found who holds it."""
        with self._lock:
            young = [pid for pid in reversed(self._young) if pid in self._known][:most]
        while young and not self._by_inode.get(inode):
            self._ask(young[:_AT_ONCE])
            del young[:_AT_ONCE]

    def _ask_some(self, inode: int, likely: Sequence[int]) -> None:
        self._ask_born(0)
        self._ask_young(inode, len(self._young))
        with self._lock:
            talkers = [pid for pid in (*likely, *reversed(self._talkers)) if pid in self._known]
        until = self._now_ns() + _ASKING_NS
        for at in range(0, len(talkers), _FEW):
            if self._by_inode.get(inode) or self._now_ns() > until:
                break
            self._ask(talkers[at : at + _FEW])

    def _ask_parents(self, inode: int, pid: int) -> None:
        """Holders share by fork first of all: ask upwards for as long as they hold it too."""
        with self._lock:
            if self._sole.get(inode) == pid:
                return
            if len(self._sole) > _MISSING_LIMIT:
                self._sole.clear()
            self._sole[inode] = pid
        for _ in range(_GENERATIONS):
            pid = procfs.parent(pid, self._proc)
            if pid in (0, 1) or pid in self._held(inode):
                return
            if inode not in self._ask([pid]):
                return

    def _ask(self, some: Sequence[int]) -> set[int]:
        """Ask them; return the sockets that they hold."""
        held = procfs.held_sockets(some, self._proc)[0].tolist() if some else []
        with self._lock:
            for inode, pid, fd in held:
                self._by_inode.setdefault(inode, {})[pid] = fd
        return {inode for inode, _, _ in held}
