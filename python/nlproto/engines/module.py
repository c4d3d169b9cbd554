# SPDX-License-Identifier: MIT
"""Engine `module`: sniffer.ko over Netlink, exact."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import numpy as np

from nlproto.errors import NoModule, VersionMismatch
from nlproto.kernel.netlink import Listener, Sniffer
from nlproto.records import wire
from nlproto.records.wire import Batch, ProcessEvent, SnapBatch, lib

__all__ = ["ModuleEngine"]

_BURST = 64  # messages a read() at most, so that its caller gets a turn under a flood


_STATE = Path("/sys/module/sniffer/initstate")  # kernel/module/sysfs.c; "live" when it is loaded


def _refuse_half_loaded() -> None:
    """Raise NoModule while insmod is at work: the family answers before the probes are there."""
    with contextlib.suppress(OSError):
        if _STATE.read_text() == "coming\n":
            raise NoModule("sniffer.ko is being loaded; try again in a moment")


class ModuleEngine:
    """Reads the groups `groups`; see nlproto.engines.engine.Engine.

    The stream begins at a FLUSH after joining, so that an account opened with `opening` knows
    every record from there on, also on a CPU whose first batches were lost.
    """

    name = "module"

    def __init__(
        self,
        groups: tuple[str, ...] = ("packets", "processes"),
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.closing: np.ndarray = np.zeros(0, wire.TAIL)
        _refuse_half_loaded()
        self._control = Sniffer()
        try:
            self._listener = Listener(groups, notify)
            try:
                info = self._control.info()
                if int(info["version"]) != lib.SNIFFER_VERSION:
                    raise VersionMismatch(
                        f"sniffer.ko speaks version {int(info['version'])} of the wire, this"
                        f" program version {lib.SNIFFER_VERSION}: load the module of this release"
                    )
                self.instance = int(info["instance"])
                self.opening = self._control.flush()
                # after the group was joined: who is not in the dump is told of there
                self._known = self._control.processes() if "processes" in groups else []
            except BaseException:
                self._listener.close()
                raise
        except BaseException:
            self._control.close()
            raise
        self._starts = _sequences(self.opening)
        self._ends: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self._control.close()

    @property
    def control(self) -> Sniffer:
        """The commands, for callers that ask the module more than the stream tells."""
        return self._control

    def read(self, timeout: float) -> Iterator[Batch | ProcessEvent | SnapBatch]:
        """Begins with the processes that the module knows already."""
        known, self._known = self._known, []
        yield from known
        timeout = 0.0 if known else timeout
        for _ in range(_BURST):
            received = self._listener.recv(timeout)
            if received is None:
                return
            timeout = 0.0
            event = self._decode(*received)
            if event is not None:
                yield event

    def _decode(self, command: int, payload: memoryview) -> Batch | ProcessEvent | SnapBatch | None:
        if command == lib.SNIFFER_CMD_PACKETS:
            batch = wire.decode_batch(payload)
            return batch if self._belongs(batch.head) else None
        if command == lib.SNIFFER_CMD_PROCESS:
            return wire.decode_process(payload)
        if command == lib.SNIFFER_CMD_SNAPS:
            return wire.decode_snaps(payload)
        return None

    def _belongs(self, head: np.void) -> bool:
        """Whether a batch lies between opening and closing; FLUSH cuts at batch boundaries."""
        if int(head["instance"]) != self.instance:
            return True
        cpu, first = int(head["cpu"]), int(head["record_seq"])
        end = self._ends.get(cpu)
        return first >= self._starts.get(cpu, 0) and (end is None or first < end)

    def want_snaps(self, wanted: bool) -> bool:
        if not wanted:
            self._listener.leave("snaps")
            return True
        try:
            self._listener.join("snaps")
        except OSError:  # unloaded meanwhile: the next read() tells
            return False
        return True

    def flush(self) -> np.ndarray:
        return self._control.flush()

    def begin(self) -> int:
        self.opening = self._control.flush()
        self._starts = _sequences(self.opening)
        return time.monotonic_ns()

    def finish(self, until_ns: int | None = None) -> Iterator[Batch | ProcessEvent | SnapBatch]:
        # The kernel queues the last batches before it answers, so what is there now is all.
        tails = self._control.flush()
        self._ends = _sequences(tails)
        while (received := self._listener.recv(0)) is not None:
            event = self._decode(*received)
            if event is not None:
                yield event
        self.closing = tails

    def stats(self) -> dict[str, object]:
        info, counters = self._control.info(), self._control.counters()
        found: dict[str, object] = {
            "engine": self.name,
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
