# SPDX-License-Identifier: MIT
"""Engine `module`: sniffer.ko over Netlink."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import numpy as np

from nlproto.errors import Error, NoModule, VersionMismatch
from nlproto.kernel.netlink import FLOWS, PACKETS, Listener, Sniffer
from nlproto.records import wire
from nlproto.records.process_event import Event, decode_process
from nlproto.records.wire import Batch, FlowBatch, lib

__all__ = ["ModuleEngine"]

_CUTS = 64  # the most changes of the group that are remembered; older batches are lost
_LONGEST = 0.1  # s of a read
_BURST = 64  # the most messages in one read(), so that the caller gets a turn in a flood

_STATE = Path("/sys/module/sniffer/initstate")  # kernel/module/sysfs.c; "live" when it is loaded


def _refuse_half_loaded() -> None:
    """Raise NoModule while insmod or rmmod runs: then the family answers, but probes are missing.

    Call it after the family has answered, because the file appears before the family.
    """
    with contextlib.suppress(OSError):
        if _STATE.read_text() != "live\n":
            raise NoModule("sniffer.ko is being loaded or unloaded; try again in a moment")


class ModuleEngine:
    """Reads the groups `groups`; of packets and flows only one. See nlproto.engines.engine.Engine.

    The stream begins at a FLUSH after joining. So an account opened with `opening` knows every
    record from there on. That holds even if the first batches of a CPU were lost.

    Raises NoModule, NoPrivilege, VersionMismatch.
    """

    name = "module"
    awaited: Callable[[], bool]

    def __init__(
        self,
        groups: tuple[str, ...] = ("packets", "processes"),
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.group = FLOWS if FLOWS in groups else PACKETS
        self.closing: np.ndarray = np.zeros(0, wire.TAIL)
        self._control = Sniffer()
        try:
            _refuse_half_loaded()
            self._listener = Listener(groups, notify)
            try:
                info = self._control.info()
                if int(info["version"]) != lib.SNIFFER_VERSION:
                    raise VersionMismatch(
                        f"sniffer.ko speaks version {int(info['version'])} of the wire, this"
                        f" program version {lib.SNIFFER_VERSION}: load the module of this release"
                    )
                self.instance = int(info["instance"])
                self.opening = self._flush()
                # after joining: a process that is not in the dump is reported by the group
                self._known = self._control.processes() if "processes" in groups else []
            except BaseException:
                self._listener.close()
                raise
        except BaseException:
            self._control.close()
            raise
        self._cuts: list[tuple[dict[int, int], str]] = []
        """Each cut: the first sequence of each CPU, and the group that its records come from."""
        self._cut()
        self._ends: dict[int, int] = {}
        self._sent_ns = 0
        """When the last batch that was read left its CPU."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._control.close()

    @property
    def control(self) -> Sniffer:
        """The module's commands, for callers that need more than the stream."""
        return self._control

    def read(self, timeout: float) -> Iterator[Event]:
        """See Engine. Begins with the processes that the module already knows."""
        known, self._known = self._known, []
        yield from known
        timeout = 0.0 if known else min(timeout, _LONGEST)
        for _ in range(_BURST):
            received = self._listener.recv(timeout)
            if received is None:
                del self._cuts[:-1]  # everything before the last cut has been read
                return
            timeout = 0.0
            event = self._decode(*received)
            if event is not None:
                yield event

    def _decode(self, command: int, payload: memoryview) -> Event | None:
        if command == lib.SNIFFER_CMD_PACKETS:
            return self._belonging(wire.decode_batch(payload), PACKETS)
        if command == lib.SNIFFER_CMD_FLOWS:
            return self._belonging(wire.decode_flows(payload), FLOWS)
        if command == lib.SNIFFER_CMD_PROCESS:
            return decode_process(payload)
        if command == lib.SNIFFER_CMD_SNAPS:
            return wire.decode_first_bytes(payload)
        return None

    def _belonging(self, batch: Batch | FlowBatch, group: str) -> Batch | FlowBatch | None:
        """Return the batch if it is of the right group and lies between opening and closing.

        FLUSH cuts at batch boundaries.
        """
        head = batch.head
        self._sent_ns = int(head["mono_ns"])
        if int(head["instance"]) != self.instance:
            return batch
        cpu, first = int(head["cpu"]), int(head["record_seq"])
        if cpu in self._ends and first >= self._ends[cpu]:
            return None
        for starts, wanted in reversed(self._cuts):
            if first >= starts.get(cpu, 0):
                return batch if group == wanted else None
        return None

    def want_packets(self, wanted: bool) -> None:
        """See Engine."""
        before, group = self.group, PACKETS if wanted else FLOWS
        if group == before:
            return
        try:
            self._listener.join(group)
        except OSError:  # unloaded meanwhile: the next read() raises
            return
        except Error:  # an older module has only packets
            return
        # a member of both groups: records before this flush come from one, the rest from the other
        self.group = group
        self.opening = self._flush()
        self._cut()
        self._listener.leave(before)

    def _cut(self) -> None:
        """Add a cut at `opening`. Older ones are dropped when the kernel's queue was empty."""
        self._cuts = [*self._cuts[-_CUTS:], (_sequences(self.opening), self.group)]

    def wake(self) -> None:
        """Do nothing: read() never waits long."""

    def want_first_bytes(self, wanted: bool) -> bool:
        """See Engine."""
        if not wanted:
            self._listener.leave("snaps")
            return True
        try:
            self._listener.join("snaps")
        except OSError:  # unloaded meanwhile: the next read() raises
            return False
        return True

    def _flush(self) -> np.ndarray:
        """Make every CPU send its messages. Returns how far each CPU is (TAIL)."""
        if self.group == FLOWS:
            tails: np.ndarray = self._control.flush_flows()["tail"]
            return tails
        return self._control.flush()

    def catch_up(self) -> Iterator[Event]:
        """See Engine."""
        tails = self._flush()
        yield from self._queued()
        self.closing = tails

    def _queued(self) -> Iterator[Event]:
        """Yield what the kernel queued before its last answer to FLUSH, even in a flood."""
        end = time.monotonic_ns()
        while (received := self._listener.recv(0)) is not None:
            event = self._decode(*received)
            if event is not None:
                yield event
            if self._sent_ns > end:
                break

    def begin(self) -> int:
        """See Engine."""
        self.opening = self._flush()
        self._cuts.clear()
        self._cut()
        return time.monotonic_ns()

    def finish(self, until_ns: int | None = None) -> Iterator[Event]:
        """See Engine."""
        tails = self._flush()
        self._ends = _sequences(tails)
        yield from self._queued()
        self.closing = tails

    def stats(self) -> dict[str, object]:
        """See Engine."""
        info, counters = self._control.info(), self._control.counters()
        found: dict[str, object] = {
            "engine": self.name,
            "group": self.group,
            "receive_bytes": self._listener.receive_bytes,
        }
        found.update({name: int(info[name]) for name in wire.INFO.names or ()})
        for name in wire.COUNTERS.names or ():
            if name != "by_how":
                found[name] = int(counters[name])
        found["by_how"] = {
            wire.how_name(how): int(n) for how, n in enumerate(counters["by_how"]) if n
        }
        return found


def _sequences(tails: np.ndarray) -> dict[int, int]:
    return {int(tail["cpu"]): int(tail["record_seq"]) for tail in tails}
