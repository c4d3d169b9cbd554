# SPDX-License-Identifier: MIT
"""Which processes hold a socket: inode -> descriptors in /proc/PID/fd, learnt step by step.

The cost of a full walk grows with the number of all descriptors. So full walks are rationed. One
readlink checks a known holder, and new processes are read first. The time for one user's sockets is
rationed too. Some sockets are cheap to make and expensive to look up: one to which only a message
in flight refers, or one that hundreds of processes have.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nlproto.host import procfs
from nlproto.host.procfs import Owner
from nlproto.running.budget import Budget, UserBudgets
from nlproto.running.left_behind import Beside

__all__ = ["Holders"]

_WALK_SHARE = 4  # of the time, for walks in the long run
_WALK_SAVED_NS = 500_000_000  # walking time that can be saved up while nothing is unknown
_WALK_WAIT_S = 0.05  # to wait for another thread's walk before nobody is found
_TOGETHER_S = 0.2  # the same for sockets that nobody waits for, or that a user made many of
_BESIDE_S = 0.5  # to wait for one's own walk: the ring of who waits fills meanwhile
_USER_SHARE, _USERS_SHARE, _USER_SAVED_NS = 6, 4, 300_000_000  # of the time; root has all
_FUTILE = 3  # a search in vain counts so many times more: of a user in good faith most succeed
_ASKED_AGAIN_NS = 50_000_000  # an inode that nobody held, when asked for again the first time
_MISSED_NS = 1_600_000_000  # the same at last, since many are the kernel's,
_MISSED_SHARE = 100  # but at least so many times what a walk takes
_OFTEN = 4  # missed as often, it is looked for by walks alone
_LARGE = 1000  # who has more sockets is asked only if there was traffic of theirs since then,
_TRAFFIC_NS = 10_000_000_000
_IDLE_SHARE, _IDLE_SAVED_NS = 200, 200_000_000  # or for this part of the time
_STALE = 65536  # sockets that have gone and may be kept until all are asked
_MISSING_LIMIT, _MANY, _GENERATIONS = 65536, 500, 8
_WALK_GAIN = 16  # a walk checks this many sockets in the time in which find() checks one
_BORN_NS, _BORN_SHARE = 10_000_000, 10  # between two looks for the newborn, and of the time
_APPEARS_NS = 100_000_000  # a process has its number some moments before /proc shows it
_YOUNG_NS = 1_000_000_000  # how long one may be about to open its first socket
_FEW, _AT_ONCE = 16, 4  # processes that are read when the youngest come first; at a time
_INHERITED_NS = 200_000_000  # for so long the birth of a process may still give it a socket


class Holders:
    """The holders of sockets, as of their last check. The threads of one program share it.

    One thread at a time walks the processes. Others get answers meanwhile: none waits long while
    another one reads /proc.
    """

    def __init__(
        self, proc: Path = procfs.PROC, now_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._lock = threading.Lock()
        """Guards all tables here. /proc is read without it."""
        self._walk_lock = threading.Lock()
        self._found = threading.local()
        self._proc = proc
        self._now_ns = now_ns
        self._by_inode: dict[int, dict[int, int]] = {}
        self._known: set[int] = set()
        self._young: dict[int, int] = {}
        self._sole: dict[int, int] = {}
        self._listed_ns = self._listing_ns = 0
        self._talkers: dict[int, None] = {}
        self._missing: dict[int, tuple[int, int]] = {}
        """Who held it was asked in vain: how often, and until when it is not asked again."""
        self._large: set[int] = set()
        self._traffic: dict[int, int] = {}
        """When a socket of theirs was last looked for because of a packet."""
        self._idle_budget = Budget(_IDLE_SHARE, _IDLE_SAVED_NS, now_ns)
        self._whole = True
        """Whether the last walk asked all."""
        self._went_ns, self._walk_found = -(1 << 62), 0
        self._settled: dict[int, int] = {}
        self._births = procfs.Births(proc)
        self._newest = self._births.last()
        self._inherited: dict[int, int] = {}
        self._welcoming = 0  # threads that read the newborn at this moment
        self._unasked_ns = self._tidied_ns = 0
        self._budget = Budget(_WALK_SHARE, _WALK_SAVED_NS, now_ns)
        self._users = UserBudgets(_USER_SHARE, _USERS_SHARE, _USER_SAVED_NS, now_ns)
        self.walked_ns = -(1 << 62)
        """When all processes were last read."""
        self.walk_took_ns = 0
        """How long the last walk took."""
        self.beside = Beside("walk", lambda: self.walk())
        self.complete = True
        """Whether the last walk could read every process (if not, it needs root)."""

    def close(self) -> None:
        """Close what is open. Answers still come, but the newly born are found later."""
        self._births.close()

    @property
    def exhaustive(self) -> bool:
        """Whether this thread's last find() without a result had read every process."""
        return bool(getattr(self._found, "exhaustive", False))

    def walk(self, only_first: bool = False) -> None:
        """Ask every process; the time it takes is missing for later ones (see due()).

        Those with many sockets and no traffic are left out most times: what is known of them stays.
        """
        with self._walk_lock, self._budget.spend():
            if only_first and self.walked_ns >= 0:
                return
            began = self._went_ns = self._now_ns()
            alive = procfs.pids(self._proc)
            with self._lock:
                self._large.intersection_update(alive)
                idle = {pid for pid in self._large if self._is_idle(pid)}
                grown = len(self._by_inode) > 2 * self._walk_found + _STALE
            self._whole = not idle or grown or self._idle_budget.allows()
            if not self._whole:
                some = [pid for pid in alive if pid not in idle]
                sockets, _ = procfs.held_sockets(some, self._proc)
                with self._lock:
                    self._learn_some(sockets, alive)
            else:
                with self._idle_budget.spend() if idle else contextlib.nullcontext():
                    self._walk_all(alive)
                self.walked_ns = began
            self.walk_took_ns = self._now_ns() - began

    def walk_beside(self, wait_s: float = _BESIDE_S) -> bool:
        """Do walk() in another thread, which can take seconds. Returns as Beside.run()."""
        return self.beside.run(wait_s)

    def _walk_all(self, alive: Sequence[int]) -> None:
        by_inode: dict[int, dict[int, int]] = {}
        sockets, complete = procfs.held_sockets(alive, self._proc)
        procfs.add_held(by_inode, sockets)
        self._walk_found = len(by_inode)
        with self._lock:
            self._measure(alive, sockets)
            self._learn(by_inode, alive)
            self.complete = complete and not procfs.is_inside(self._proc)

    def _learn_some(self, sockets: np.ndarray, alive: Sequence[int]) -> None:
        """Take what was found of all but a few; what is known of these is checked when used."""
        procfs.add_held(self._by_inode, sockets)
        for pid in np.unique(sockets["pid"]).tolist():
            self._talkers.setdefault(pid)
        if not self._known.issuperset(alive):
            self._unasked_ns = self._now_ns()
        self._known = set(alive)

    def _is_idle(self, pid: int) -> bool:
        """Whether it is expensive to ask, and had no packet."""
        return self._traffic.get(pid, -(1 << 62)) + _TRAFFIC_NS < self._now_ns()

    def _measure(self, asked: Iterable[int], sockets: np.ndarray) -> None:
        """Remember who of those `asked` has many `sockets` (HELD)."""
        self._large.difference_update(asked)
        if len(sockets) > _LARGE:
            pids, counts = np.unique(sockets["pid"], return_counts=True)
            self._large.update(pids[counts > _LARGE].tolist())
        if len(self._traffic) > len(self._large):
            self._traffic = {pid: at for pid, at in self._traffic.items() if pid in self._large}

    def _learn(self, by_inode: dict[int, dict[int, int]], alive: Sequence[int]) -> None:
        """Store the result of a walk. Processes born since it began are read once more."""
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
        self._sole = {inode: pid for inode, held in by_inode.items() for pid in held}

    def due(self) -> bool:
        """Return whether a full walk may be made now and no thread is making one."""
        return not self._walk_lock.locked() and self._budget.allows()

    def allows(self, uid: int) -> bool:
        """Return whether time is left to search for holders of `uid`'s sockets."""
        return self._users.allows(uid)

    def find(self, inode: int, uid: int = 0) -> tuple[Owner, ...]:
        """Return the living holders of a socket, the likely user first; empty if none is found.

        The likely user is the process that once held it alone, as long as it holds it: children
        inherit descriptors that they never use. Otherwise it is the youngest, which probably got
        the socket to use it. The time counts for `uid`, the socket's user. With no time left nobody
        is found.
        """
        return self._find_soon(inode, uid, ()) or self.find_anywhere(inode, uid)

    def find_many(
        self, inodes: Sequence[int], uids: Sequence[int]
    ) -> Iterator[tuple[int, tuple[Owner, ...]]]:
        """Do find() for each of `inodes`, many at once, users' few while the caller has time."""
        if len(inodes) > max(_MANY, len(self._by_inode) // _WALK_GAIN):
            yield from self.find_together(inodes)
            return
        for inode, uid in zip(inodes, uids, strict=True):
            yield inode, self.find(inode, uid)
            if uid and self.beside.is_over():
                return

    def find_together(self, inodes: Sequence[int]) -> Iterator[tuple[int, tuple[Owner, ...]]]:
        """Do find() for each of `inodes`. Each process is read once, by a walk if one is due."""
        if self.walked_ns < 0:
            self.walk(only_first=True)
        elif not self.due() or not self.walk_beside(_TOGETHER_S):
            self._ask_born(0)
        asked: dict[int, Owner | None] = {}
        for at in range(0, len(inodes), _MANY):
            some = inodes[at : at + _MANY]
            with self._lock:
                known = [(*self._by_inode.get(inode, ()),) for inode in some]
            new = {pid for held in known for pid in held}.difference(asked)
            found = {one.identity.tgid: one for one in procfs.owners(list(new), self._proc)}
            asked |= dict.fromkeys(new) | found
            for inode, held in zip(some, known, strict=True):
                held = held if self._whole else (*self._checked(inode),)
                only = asked.get(held[0]) if len(held) == 1 else None
                yield inode, (only,) if only else self._owners(inode, held, asked.get)

    def find_soon(self, inode: int, uid: int, likely: Sequence[int] = ()) -> tuple[Owner, ...]:
        """As find(), but ask only the newly born, then `likely`, then who had sockets before.

        For a socket that a packet was for.
        """
        found = self._find_soon(inode, uid, likely)
        with self._lock:
            large = {one.identity.tgid for one in found} & self._large
            self._traffic |= dict.fromkeys(large, self._now_ns())
        return found

    def _find_soon(self, inode: int, uid: int, likely: Sequence[int]) -> tuple[Owner, ...]:
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
            missed, until_ns = self._missing.get(inode, (0, 0))
            began = self._now_ns()
            if not held and began >= until_ns and missed < _OFTEN:
                self._ask_some(inode, likely)
                held = self._checked(inode)
                if not held:
                    self._users.charge(uid, _FUTILE * (self._now_ns() - began))
            if len(held) == 1:
                self._ask_parents(inode, *held)
                held = self._held(inode) or held
            return self._owners(inode, held)

    def find_anywhere(self, inode: int, uid: int = 0) -> tuple[Owner, ...]:
        """Do what find() does after find_soon() found nobody: read all, if a walk is due."""
        if not inode:
            return ()
        missed, until_ns = self._missing.get(inode, (0, 0))
        if self._now_ns() < until_ns:
            self._found.exhaustive = self.complete and self._whole
            return ()
        if not self._users.allows(uid):
            return ()
        self._wait_for_walk()
        pause_ns = self._pause_ns(missed)
        if self._now_ns() - self._went_ns < pause_ns:
            # the last walk is recent enough
            self._found.exhaustive = self.complete and self._whole
        elif self.due():
            asked_ns = self._now_ns()
            with self._users.spend(uid):
                ended = self.walk_beside() and self._went_ns >= asked_ns
            self._found.exhaustive = ended and self.complete and self._whole
        with self._users.spend(uid):
            held = self._held_by(inode)
            with self._lock:
                if held:
                    self._missing.pop(inode, None)
                elif self.exhaustive or not self._whole:
                    if len(self._missing) > _MISSING_LIMIT:
                        self._missing.clear()
                    until_ns = self._now_ns() + max(_ASKED_AGAIN_NS, pause_ns)
                    self._missing[inode] = missed + 1, until_ns
            return self._owners(inode, held)

    def _pause_ns(self, missed: int) -> int:
        """How old the last walk may be when a socket is looked for that was missed so often."""
        if not missed:
            return 0
        most = max(_MISSED_NS, _MISSED_SHARE * self.walk_took_ns)
        return int(min(_ASKED_AGAIN_NS << min(missed - 1, 30), most))

    def _held_by(self, inode: int) -> dict[int, int]:
        """Who held it in the last walk; where that left out some, who does now."""
        return self._held(inode) if self._whole else self._checked(inode)

    def _held(self, inode: int) -> dict[int, int]:
        """Return who is known to hold it: {pid: descriptor}."""
        with self._lock:
            return self._by_inode.get(inode, {}).copy()

    def _wait_for_walk(self) -> None:
        """Wait a moment if another thread walks: it may be about to find this holder."""
        if not self._walk_lock.locked() or self.beside.is_over():
            return
        if self._walk_lock.acquire(timeout=_WALK_WAIT_S):
            self._walk_lock.release()

    def known(self, inode: int) -> tuple[Owner, ...]:
        """Return the holders that were known before; cheap."""
        return self._owners(inode, self._checked(inode))

    def peek(self, inode: int) -> Iterator[Owner]:
        """Return what known() returns, but learn and forget nothing."""
        holders = procfs.still_held(inode, self._held(inode), self._proc)
        yield from procfs.owners(tuple(holders), self._proc)

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
                self._talkers[found.identity.tgid] = None  # the latest holder is checked first
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
        """Read the newborn processes: by fork they hold what their parents hold."""
        now = self._now_ns()
        if now - self._listed_ns < older_ns:
            return
        if self._births.none_since(self._listed_ns - _APPEARS_NS, now):
            return
        alive = procfs.pids(self._proc)
        with self._lock:
            born = [pid for pid in alive if pid not in self._known]
            self._known = set(alive)
            self._listed_ns, self._listing_ns = now, self._now_ns() - now
            first = len(born) == len(alive)
            self._welcoming += not first
        if first:
            self._ask(born)
        else:
            self._welcome(born, now)

    def _find_newest(self, inode: int) -> tuple[Owner, ...]:
        """Read the youngest processes, new ones or known: one may live a millisecond.

        Each step takes a tenth of that. They are listed before other holders are searched.
        """
        self.meet_newest()
        self._ask_young(inode, _FEW)
        ask = functools.cache(functools.partial(procfs.owner, proc=self._proc))
        held = [pid for pid in self._held(inode) if ask(pid)]
        if len(held) == 1:
            self._ask_parents(inode, *held)
        return self._owners(inode, self._held(inode) or held, ask) if held else ()

    def meet_newest(self) -> None:
        """Read the youngest processes born since the last look, without the list of all."""
        newest, now = self._births.last(), self._now_ns()
        with self._lock:
            before, self._newest = self._newest, newest
            if before == newest:
                return
            numbers = range(newest, before, -1)
            if not numbers or len(numbers) > _FEW:
                self._unasked_ns = now  # the list will have the others
            born = [pid for pid in numbers[:_FEW] if pid not in self._known]
            self._welcoming += 1
        self._welcome(born, now, made_up=True)

    def _welcome(self, born: Sequence[int], now: int, made_up: bool = False) -> None:
        """Read new processes, and note what they may have got from their parents.

        `made_up`: some may be threads. The caller has counted itself in `_welcoming`.
        """
        got: set[int] = set()
        try:
            if made_up:
                born = [pid for pid in born if procfs.is_process(pid)]
            with self._lock:
                self._known.update(born)
                self._young = {pid: at for pid, at in self._young.items() if now - at < _YOUNG_NS}
                self._young |= dict.fromkeys(sorted(born), now)
            got = self._ask(born)
        finally:
            with self._lock:
                self._welcoming -= 1
                done = self._now_ns()
                self._inherited |= dict.fromkeys(got, done)
                if now - self._tidied_ns > _YOUNG_NS:
                    self._tidied_ns, recent = now, now - _INHERITED_NS
                    got_before = self._inherited.items()
                    self._inherited = {one: at for one, at in got_before if at > recent}

    def have_left(self, some: Sequence[tuple[int, int]]) -> set[tuple[int, int]]:
        """Return those of `some` (inode, process) that are not known to hold it any more."""
        with self._lock:
            known = [self._by_inode.get(inode, {}).get(pid, -1) for inode, pid in some]
        there = [(*one, fd) for one, fd in zip(some, known, strict=True) if fd >= 0]
        held = procfs.are_held(np.array(there, procfs.HELD), self._proc).tolist()
        return set(some) - {one[:2] for one, holds in zip(there, held, strict=True) if holds}

    def may_be_inherited(self, inode: int, since_ns: int) -> bool:
        """Return whether a process born between then and meet_newest() may hold it too."""
        with self._lock:
            told = max(self._inherited.get(inode, 0), self._unasked_ns)
            return self._welcoming > 0 or told > since_ns  # another thread may be about to know

    def _ask_young(self, inode: int, most: int) -> None:
        """Read the youngest first, until one is found that holds it."""
        with self._lock:
            young = [pid for pid in reversed(self._young) if pid in self._known][:most]
        while young and not self._held(inode) and not self.beside.is_over():
            self._ask(young[:_AT_ONCE])
            del young[:_AT_ONCE]

    def _ask_some(self, inode: int, likely: Sequence[int]) -> None:
        self._ask_born(0)
        self._ask_young(inode, len(self._young))
        with self._lock:
            known = [pid for pid in (*likely, *reversed(self._talkers)) if pid in self._known]
            dear = {pid for pid in self._large if pid not in likely and self._is_idle(pid)}
        cheap = [pid for pid in known if pid not in dear]
        for some in (cheap[:1], *(cheap[at : at + _FEW] for at in range(1, len(cheap), _FEW))):
            if self._held(inode) or self.beside.is_over():
                return
            self._ask(some)
        for pid in [pid for pid in known if pid in dear]:
            if self._held(inode) or self.beside.is_over() or not self._idle_budget.allows():
                return
            with self._idle_budget.spend():
                self._ask([pid])

    def _ask_parents(self, inode: int, pid: int) -> None:
        """Most shared sockets come from fork: go up the parents as long as they hold it too."""
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
        if not some:
            return set()
        sockets = procfs.held_sockets(some, self._proc)[0]
        with self._lock:
            self._measure(some, sockets)
            procfs.add_held(self._by_inode, sockets)
        return set(sockets["inode"].tolist())
