# SPDX-License-Identifier: MIT
"""Watches what packets do not show: closed listeners, a module that comes and goes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from daemon.sharing.rounds import Rounds
from nlproto._host import lib as host
from nlproto.engines.engine import Engine, open_engine
from nlproto.errors import Error, NoModule, NoPrivilege
from nlproto.host.holders import Holders
from nlproto.host.kernel_sockets import BoundSocket, KernelSockets
from nlproto.host.netns import Finder
from nlproto.kernel.bpf import NoBpf
from nlproto.kernel.drop_reasons import NOT_SPECIFIED, Dropped, DropReasons
from nlproto.pipeline.pipeline import Pipeline
from nlproto.running.left_behind import Beside
from nlproto.running.supervise import Failures, keep_going
from nlproto.running.urgency import Urgency
from nlproto.tables.drops import Drops, added
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import ProcessKey

__all__ = ["Watcher", "present_sockets"]

_SOCKETS = 0.5  # s between two looks
_FRESH = 0.9  # s; a look is not older than this for a question, which waits for the next look
_FIRST = 2.0  # s; the first one began before the engine was open
_SOON = 0.4  # s; after an older one there is the next, if root asks: the next question may not wait
_PATIENCE = 3.0  # s that a question waits for it
_BUSY, _LATE = 0.3, 3.0
"""After the first, who sees everything takes a look that is not older than the second, s: looks are
slow, so the machine has no time for them."""
_SHARE = 500  # looks take this part of one core while nobody asks,
_OLDEST = 60.0  # s: unless the last look would get older than this
_DETAILS = 0.05  # s after a look for details of users' processes
_OTHERS_NS = 50_000_000  # of a look for users' network namespaces
_MOST_UNMET = 10_000
_STRANGE = 30.0  # s that packets dropped at a socket wait for its user to become known
_LEAVING = 1.0  # s that the end waits for a look; the thread is left behind then
_MODULE = 1.0  # s between two tries to open the module
_TRIM = 10.0  # s between two times that free memory is given back

log = logging.getLogger(__name__)


def present_sockets(holders: Holders, finder: Finder | None) -> KernelSockets:
    """Return what a Watcher looks at."""
    return KernelSockets(holders, others_ns=_OTHERS_NS, finder=finder)


class Watcher:
    """A thread; a context manager. `engine` is the configured name: auto, module or packet.

    With auto, engine packet replaces a module that goes, until the module is back. With module, the
    daemon waits for it. Each change is logged and sent to clients. A look that fails is logged and
    tried again. `on_death` is called if that does not help.
    """

    def __init__(
        self,
        engine: str,
        pipeline: Pipeline,
        announce: Callable[..., None],
        on_death: Callable[[Error], None],
        holders: Holders,
        ring_bytes: int | None = None,
        finder: Finder | None = None,
        drop_reasons: bool = False,
        kernel: KernelSockets | None = None,
    ) -> None:
        self._wanted = engine
        self._pipeline = pipeline
        self._announce = announce
        self._ring_bytes = ring_bytes
        self._stopping = threading.Event()
        self._holders, self._finder = holders, finder
        self.kernel = present_sockets(holders, finder) if kernel is None else kernel
        """What the last look found."""
        self.on_drops: Callable[[int, int, bytes, int], None] = lambda *_: None
        """Is told of packets that the kernel dropped: tgid, start_ns, comm and how many."""
        self.on_reason: Callable[[int, int, bytes, str, int], None] = lambda *_: None
        """Is told why: tgid, start_ns, comm, the kernel's reason and how many. tgid 0: nobody."""
        self._drops = Drops()
        self._wants_reasons = drop_reasons
        self._drop_reasons: DropReasons | None = None
        self._why_no_reasons = "off"
        self.dropped: Dropped = {}
        """Why the kernel dropped packets at the present sockets, as of the last look."""
        self._told_dropped: dict[tuple[int, str], int] = {}
        self._strangers: dict[tuple[int, str], float] = {}
        """What was dropped at sockets whose user is not known, and since when."""
        self._failures = Failures("watcher")
        self._thread = threading.Thread(
            target=lambda: keep_going(self._watch, self._failures, on_death),
            name="watcher",
            daemon=True,
        )
        self._looked = 0.0
        """When the last look began whose result is in the port map; CLOCK_MONOTONIC, s."""
        self._looks = 0
        self._news = threading.Condition()
        """Guards `_looked`, and wakes threads that wait for it."""
        self._asked = threading.Event()
        self._soon = False
        """Whether the next look shall begin before anybody waits for it."""
        self._unmet: Rounds[tuple[ProcessKey, str, int]] = Rounds()
        """Processes whose details will be read: key, comm, uid. Users take turns."""
        self._unmet_count = 0
        self._unmet_lock = threading.Lock()
        self._meeting = Beside("details", self._meet)
        self._told: set[str] = set()
        self._probes_fire = True

    def __enter__(self) -> Watcher:
        if self._wants_reasons:
            try:
                self._drop_reasons = DropReasons()
            except NoBpf as error:
                self._why_no_reasons = f"not known: {error}"
                log.info("why the kernel drops packets is not known: %s", error)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stopping.set()
        self._asked.set()
        self._thread.join(_LEAVING)
        if self._drop_reasons is not None and not self._thread.is_alive():
            self._drop_reasons.close()

    @property
    def is_fresh(self) -> bool:
        """Whether the last look was within a second."""
        return time.monotonic() - self._looked < _FRESH

    def refresh(self, stop: Callable[[], None], full: bool = False) -> None:
        """Return when it was, or after 3 s. Any thread. `stop` ends it by raising.

        `full`: a user asks who sees everything. Such users often ask again, and do not wait long on
        a machine that has no time for looks.
        """
        began = time.monotonic()
        wanted = began - (_FIRST if self._looks < 2 else _FRESH)
        if full and 0 < self._looked < began - _SOON:
            self._soon = True
            self._asked.set()
        with self._news:
            while self._looked < wanted and time.monotonic() < began + _PATIENCE:
                self._asked.set()
                self._news.wait(0.02)
                stop()
                if full and time.monotonic() - began > _BUSY:
                    wanted = began - _LATE

    def drop_figures(self) -> dict[str, Any]:
        """Return for stats whether drops have reasons, and those that no socket has. Any thread."""
        counting = self._drop_reasons
        if counting is None:
            return {"reasons": self._why_no_reasons}
        ownerless = counting.ownerless()
        unknown = ownerless.pop(NOT_SPECIFIED, 0)
        return {
            "reasons": "counted",
            "ownerless": sum(ownerless.values()),
            "ownerless_reasons": ownerless,
            "not_specified": unknown,
        }

    def _watch(self) -> bool:
        with self.kernel:
            self._go_round()
        return False

    def _go_round(self) -> None:
        Urgency(real_time=False).look()
        jobs: list[tuple[float, Callable[[], None]]] = [
            (_SOCKETS, self._look_at_sockets),
            (_MODULE, self._look_for_module),
            (_MODULE, self._look_at_probes),
            (_TRIM, host.host_trim),
        ]
        due = [0.0 for _ in jobs]
        while not self._stopping.is_set():
            self._asked.wait(max(0.0, min(due) - time.monotonic()))
            for index, (interval, job) in enumerate(jobs):
                started = time.monotonic()
                if started < due[index] and not (
                    job == self._look_at_sockets and self._wanted_now()
                ):
                    continue
                self._run(job)
                due[index] = started + _pause(interval, time.monotonic() - started)

    def _wanted_now(self) -> bool:
        """Return whether somebody waits for a look. The last one may have been enough."""
        asked, soon = self._asked.is_set(), self._soon
        self._asked.clear()
        self._soon = False
        return asked and (soon or not self.is_fresh)

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as error:
            self._failures.add(error, job.__name__.strip("_").replace("_", " "))
        else:
            self._failures.clear()

    def _look_at_sockets(self) -> None:
        portmap = self._pipeline.portmap
        if portmap is None:
            return
        found = self.kernel.read()
        before = self.kernel.looked_ns
        bound = self._known(found.bound)
        if found.present is None:
            portmap.replace_bound(bound, before)
        else:
            portmap.update_bound(bound, found.changed, found.present, before)
        portmap.add_connected(self._known(found.connected), before)
        if len(found.cookies):
            portmap.keep_cookies(found.cookies, before)
        portmap.expire(before)
        if self._drop_reasons is not None:
            self.dropped = self._drop_reasons.read(self.kernel.tables)
        with self._news:
            self._looked = before / 1e9
            self._looks += 1
            self._news.notify_all()
        if self._unmet:
            self._meeting.run(0.0)
        self._count_drops(portmap)
        self._count_reasons(portmap)

    def _count_drops(self, portmap: PortMap) -> None:
        """A socket's drops count for the process that used it last."""
        drops = self._drops.take(self.kernel.tables.values())
        if not drops:
            return
        for cookie, owner in portmap.last_users(drops).items():
            self.on_drops(owner.tgid, owner.start_ns, owner.comm.encode(), drops[cookie])

    def _count_reasons(self, portmap: PortMap) -> None:
        """The user of a socket may become known a little later."""
        now = {
            (cookie, reason): count
            for cookie, reasons in self.dropped.items()
            for reason, count in reasons.items()
        }
        news = added(self._told_dropped, now)
        self._told_dropped = now
        if not news:
            return
        owners = portmap.last_users({cookie for cookie, _ in news if cookie})
        moment, before = time.monotonic(), self._strangers
        strangers = {key: before.get(key, moment) for key in news if key[0] not in owners}
        self._strangers = {key: at for key, at in strangers.items() if moment - at < _STRANGE}
        for key in self._strangers:
            now[key] -= news.pop(key)
        for (cookie, reason), count in news.items():
            whom = 0, 0, b""
            if cookie in owners:
                owner = owners[cookie]
                whom = owner.tgid, owner.start_ns, owner.comm.encode()
            self.on_reason(*whom, reason, count)

    def _known(self, sockets: list[BoundSocket]) -> list[BoundSocket]:
        """Return the sockets with start times under which their processes will soon be known.

        What is in /proc about them is read beside. Root's can be asked for by name at once; users
        can have any number.
        """
        processes = self._pipeline.processes
        starts: dict[ProcessKey, int] = {}
        known = []
        for one in sockets:
            start_ns = starts.get(one.key)
            if start_ns is None:
                start_ns = starts[one.key] = processes.start_of(one.tgid, one.start_ns)
                if not one.uid:
                    processes.meet(one.tgid, start_ns, one.comm, 0)
                self._will_meet((one.tgid, start_ns), one.comm, one.uid)
            known.append(one if start_ns == one.start_ns else one._replace(start_ns=start_ns))
        return known

    def _will_meet(self, key: ProcessKey, comm: str, uid: int) -> None:
        with self._unmet_lock:
            if self._unmet_count > _MOST_UNMET:
                self._unmet, self._unmet_count = Rounds(), 0
            self._unmet.add(uid, (key, comm, uid))
            self._unmet_count += 1

    def _meet(self) -> None:
        """Read details of processes, in a thread that nobody waits for: that may hang.

        Users can have any number. So theirs take a moment after each look.
        """
        until = time.monotonic() + _DETAILS
        while True:
            with self._unmet_lock:
                root = 0 if 0 in self._unmet else None
                if root is None and time.monotonic() >= until:
                    return
                one = self._unmet.next(root)
                self._unmet_count *= bool(self._unmet)
            if one is None:
                return
            key, comm, uid = one
            self._pipeline.processes.add(*key, comm, uid)

    def _look_for_module(self) -> None:
        pipeline = self._pipeline
        if pipeline.failed:
            self._replace(pipeline)
        elif self._wanted == "auto" and pipeline.engine.name != "module":
            engine = _module()
            if engine is not None:
                self._change(engine, "module_back", "the module is loaded: records are exact now")

    def _look_at_probes(self) -> None:
        """kprobes can be switched off under a loaded module, which then knows less."""
        fire = bool(self._pipeline.engine_stats.get("canary", 1))
        if fire == self._probes_fire:
            return
        self._probes_fire = fire
        message = "the kernel's probes fire again: names are exact"
        if not fire:
            message = (
                "the kernel's probes do not fire: sockets that only receive, are passed or shared"
                " may be named late, wrongly or not at all (sudo sysctl kernel.ftrace_enabled=1)"
            )
        self._tell("probes", message, self._pipeline.engine.name)

    def _replace(self, pipeline: Pipeline) -> None:
        """The engine failed."""
        gone = pipeline.engine.name
        engine = _module() if self._wanted in ("auto", "module") else None
        if engine is not None:
            self._change(engine, "module_back", "the module is loaded again")
            return
        if self._wanted == "module":
            self._once(
                "module_gone",
                "the module is gone: nothing is recorded until it is loaded again"
                " (packet-hunter doctor says how)",
            )
            return
        # packet starts at once, and each moment without an engine is lost
        engine = open_engine(
            "packet",
            log.warning,
            ring_bytes=self._ring_bytes,
            holders=self._holders,
            finder=self._finder,
        )
        message = f"engine {gone} has gone: going on with engine {engine.name}"
        self._change(engine, f"{gone}_gone", message)

    def _change(self, engine: Engine, event: str, message: str) -> None:
        if self._stopping.is_set():
            engine.__exit__(None, None, None)
            return
        self._pipeline.switch(engine)
        self._told.discard("module_gone")
        self._tell(event, message, engine.name)

    def _once(self, event: str, message: str) -> None:
        if event not in self._told:
            self._told.add(event)
            self._tell(event, message, "none")

    def _tell(self, event: str, message: str, engine: str) -> None:
        log.warning("%s", message, extra={"fields": {"EVENT": event, "ENGINE": engine}})
        fields: dict[str, Any] = {"message": message, "engine": engine}
        self._announce(event, **fields)


def _pause(interval: float, took: float) -> float:
    """Return the s from the beginning of a look that took `took` s to the next one.

    A long look comes less often, so that looks take a fifth of a percent of one core. But the last
    one does not get older than that.
    """
    return max(interval, min(_SHARE * took, _OLDEST - took))


def _module() -> Engine | None:
    try:
        return open_engine("module", log.warning)
    except (NoModule, NoPrivilege):
        return None
