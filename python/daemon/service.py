# SPDX-License-Identifier: MIT
"""The daemon's life: start in order, serve, reload, end in reverse order."""

from __future__ import annotations

import sys

if "asyncio" not in sys.modules:
    # asyncio loads OpenSSL if it is there: 4 MB of memory that nothing here uses
    sys.modules["ssl"] = None  # type: ignore[assignment]
    import asyncio

    del sys.modules["ssl"]
import asyncio
import contextlib
import dataclasses
import gc
import logging
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from daemon.history.recorder import Recorder
from daemon.serve.answers import Answers
from daemon.serve.bounds import bounds_of, memory_limit
from daemon.serve.server import Server
from daemon.system import logs
from daemon.system.config import RELOADABLE, Config
from daemon.system.connections import Connections
from daemon.system.metrics import Metrics
from daemon.system.notify import Notifier
from daemon.system.socketfile import SocketFile
from daemon.system.watcher import Watcher, present_sockets
from nlproto._host import lib as host
from nlproto.engines.engine import open_engine
from nlproto.errors import Error, UsageError
from nlproto.host import procfs
from nlproto.host.containers import ContainerFiles
from nlproto.host.hashes import Hashes
from nlproto.host.holders import Holders
from nlproto.host.kernel_sockets import KernelSockets
from nlproto.host.netns import Finder
from nlproto.overheard.listening import Overheard
from nlproto.pipeline.account import Account
from nlproto.pipeline.naming import Namer
from nlproto.pipeline.pipeline import Pipeline
from nlproto.pipeline.queue import MessageQueue
from nlproto.running import descriptors
from nlproto.running.supervise import Failures
from nlproto.tables.portmap import PortMap
from nlproto.tables.processes import Processes
from nlproto.tables.shares import Payers

__all__ = ["SWITCH_INTERVAL", "Service"]

SWITCH_INTERVAL = 0.0001  # s that each system call of the event loop may wait, twice or more
_WORKER_HANGS = 10.0  # s
_MOST_LISTENERS = 10_000
"""Kinds of things whose first sight is recorded."""

log = logging.getLogger("daemon")


class Service:
    """The daemon. Calls `configuration` at start and at each SIGHUP."""

    def __init__(
        self,
        configuration: Callable[[], Config],
        environment: Mapping[str, str],
        foreground: bool = False,
    ) -> None:
        self._configuration = configuration
        self._environment = environment
        self._foreground = foreground
        self._notifier = Notifier(environment)
        self._death: Error | None = None
        self._end: Callable[[], object] = lambda: None
        self.config = configuration()
        self._bounds = bounds_of(self.config, memory_limit())

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT. Returns the exit code: 1 if a part could not go on.

        Raises Error if it cannot start.
        """
        descriptors.raise_limit()
        config = self.config
        logs.set_up(config.log, config.log_level, self._environment, self._foreground)
        sys.setswitchinterval(SWITCH_INTERVAL)
        host.host_one_heap()
        payers = Payers()
        holders, finder = Holders(), Finder()
        processes = Processes(
            self._details,
            config.max_processes,
            payers=payers,
            containers=ContainerFiles(),
            cmdline=config.cmdline,
        )
        with (
            SocketFile(config.socket) as socket_file,
            Recorder(config, processes, payers) as recorder,
            Namer(processes.start_of, holders, finder=finder) as namer,
            contextlib.ExitStack() as stack,
        ):
            gc.disable()  # what the start makes is long-lived
            kernel = present_sockets(holders, finder)
            kernel.look_ahead()  # opening the engine mostly waits for the kernel
            if config.sha256 == "on":
                processes.hash = stack.enter_context(Hashes(processes.hashed)).ask
            overheard = stack.enter_context(
                Overheard(log.warning, config.domains, recorder.history, finder)
            )
            processes.ends = overheard.ends
            recorder.text_of = overheard.names.text
            engine = open_engine(
                config.engine,
                log.warning,
                ring_bytes=config.ring_size,
                holders=holders,
                finder=finder,
            )
            pipeline = Pipeline(
                engine,
                account=Account(),
                processes=processes,
                namer=namer,
                portmap=PortMap(config.max_ports, payers=payers),
                queue=MessageQueue(config.queue_size),
                on_death=self._die,
                packets=False,
                overheard=overheard,
            )
            recorder.on_death = self._die
            asyncio.run(
                self._serve(
                    socket_file, pipeline, recorder, holders, overheard, finder, kernel, payers
                )
            )
        for line in pipeline.account.lines():
            log.info("%s", line)
        return 0 if self._death is None else 1

    def _die(self, error: Error) -> None:
        """End the program; the service manager starts it again. Any thread."""
        log.critical("%s", error)
        self._death = self._death or error
        self._end()

    def _details(self, pid: int, start_ns: int) -> procfs.ProcessDetails | None:
        return procfs.details(pid, start_ns, cmdline=self.config.cmdline)

    async def _serve(
        self,
        socket_file: SocketFile,
        pipeline: Pipeline,
        recorder: Recorder,
        holders: Holders,
        overheard: Overheard,
        finder: Finder,
        kernel: KernelSockets,
        payers: Payers,
    ) -> None:
        loop = asyncio.get_running_loop()
        answers = Answers(pipeline, recorder.history, recorder.past, recorder.past_process)
        answers.remembers_since = recorder.remembers_since
        answers.name_of = recorder.name_of
        answers.sums = recorder.usage
        answers.recorder = recorder
        if (portmap := pipeline.portmap) is not None:
            recorder.listeners = lambda: portmap.listeners(_MOST_LISTENERS)
        answers.translations = overheard.translations
        server = Server(
            loop, answers, self.config, lambda: figures(pipeline, recorder, watcher), self._bounds
        )
        watcher = Watcher(
            self.config.engine,
            pipeline,
            server.announce,
            self._die,
            holders,
            self.config.ring_size,
            finder,
            drop_reasons=self.config.drop_reasons == "on",
            kernel=kernel,
        )
        answers.dropped = lambda: watcher.dropped
        answers.kernel, answers.looks = watcher.kernel, watcher
        metrics = Metrics(self.config, server.figures, pipeline.processes, payers)
        watcher.on_drops, watcher.on_reason = metrics.drop, metrics.drop_for
        for take in (recorder.take, metrics.take, server.publish):
            pipeline.subscribe(take)
        ended = asyncio.Event()
        self._end = lambda: loop.call_soon_threadsafe(ended.set)
        if self._death is not None:
            ended.set()
        unforeseen = Failures("event loop")
        loop.set_exception_handler(lambda _, what: unforeseen.add(*_failure(what)))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ended.set)
        parts: list[Reconfigurable] = [server, recorder, metrics]
        loop.add_signal_handler(signal.SIGHUP, lambda: self._reload(server, parts))
        connections = Connections(
            lambda found: metrics.learn(recorder.history.learn(found)), finder
        )
        with metrics, pipeline, watcher, connections:
            server.start(socket_file.socket)
            status = f"engine {pipeline.engine.name}, serving {self.config.socket}"
            log.info("%s", status)
            self._notifier.ready(status)
            settled = loop.create_task(_collect_later(watcher))
            watchdog = loop.create_task(self._watch(pipeline))
            await ended.wait()
            log.info("ending")
            self._notifier.stopping()
            watchdog.cancel()
            settled.cancel()
            # packets under way still reach the subscribers
            stops = [loop.run_in_executor(None, one.stop) for one in (watcher, pipeline)]
            await asyncio.gather(*stops)
            await server.stop()

    def _reload(self, server: Server, parts: list[Reconfigurable]) -> None:
        """Apply what can change at run time (SIGHUP). A file with a mistake changes nothing."""
        self._notifier.reloading()
        try:
            self._take_configuration(server, parts)
        finally:  # the service manager waits for it
            self._notifier.ready(f"serving {self.config.socket}")

    def _take_configuration(self, server: Server, parts: list[Reconfigurable]) -> None:
        try:
            new, old = self._configuration(), self.config
            values = dataclasses.asdict(new)
            changed = dataclasses.replace(old, **{name: values[name] for name in RELOADABLE})
            bounds = bounds_of(changed, self._bounds.limit)
        except UsageError as error:
            log.error("configuration not changed: %s", error)
        else:
            late = [name for name in values if values[name] != getattr(old, name)]
            late = [name for name in late if name not in RELOADABLE]
            if late:
                log.warning("a restart is needed for: %s", ", ".join(late))
            self.config, self._bounds = changed, bounds
            logging.getLogger().setLevel(self.config.log_level.upper())
            server.bounds = bounds
            for part in parts:
                part.reconfigure(self.config)
            log.info("configuration read again")

    async def _watch(self, pipeline: Pipeline) -> None:
        """Feed the watchdog as long as this loop and the worker both go round."""
        if self._notifier.watchdog is None:
            return
        while True:
            if time.monotonic() - pipeline.beat < _WORKER_HANGS:
                self._notifier.alive()
            else:
                log.error("the worker has not moved for %g s", _WORKER_HANGS)
            await asyncio.sleep(self._notifier.watchdog / 3)


async def _collect_later(watcher: Watcher) -> None:
    """Collect garbage from when the first look is in the port map: all until then lives long."""
    await asyncio.get_running_loop().run_in_executor(None, watcher.refresh, lambda: None)
    gc.freeze()
    gc.enable()


def _failure(context: Mapping[str, Any]) -> tuple[Exception, str]:
    """Log an exception of the event loop that nobody caught."""
    error = context.get("exception")
    return error if isinstance(error, Exception) else Error(context["message"]), ""


class Reconfigurable(Protocol):
    def reconfigure(self, config: Config) -> None: ...


def figures(pipeline: Pipeline, recorder: Recorder, watcher: Watcher) -> dict[str, Any]:
    """Return sizes and losses of every part, for stats and metrics."""
    queue, history, portmap = pipeline.queue, recorder.history, pipeline.portmap
    return {
        "engine_stats": pipeline.engine_stats,
        "engine_failed": pipeline.failed,
        "queue": {
            "bytes": queue.bytes,
            "max_bytes": queue.max_bytes,
            "peak_bytes": queue.peak_bytes,
            "dropped_batches": queue.dropped_messages,
            "dropped_records": queue.dropped_records,
        },
        "processes": {
            "known": len(pipeline.processes),
            "limit": pipeline.processes.limit,
            "evicted": pipeline.processes.evicted,
        },
        "ports": {
            "known": 0 if portmap is None else len(portmap),
            "evicted": 0 if portmap is None else portmap.evicted,
        },
        "history": {
            "flows": len(history),
            "limit": history.limit,
            "evicted": history.evicted,
            "unstored": history.unstored,
            "store": recorder.store_figures(),
        },
        "drops": watcher.drop_figures(),
        "domains": {} if pipeline.overheard is None else pipeline.overheard.figures(),
    }
