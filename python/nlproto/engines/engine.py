# SPDX-License-Identifier: MIT
"""Engines: sources of records. `ebpf` follows the rules of `module`; `packet` has its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, Self

import numpy as np

from nlproto.errors import NoModule, NoPrivilege, UsageError
from nlproto.host.holders import Holders
from nlproto.host.netns import Finder
from nlproto.kernel.loading import advice
from nlproto.records.process_event import Event

__all__ = ["ENGINES", "Engine", "Event", "open_engine"]

ENGINES = ("auto", "module", "ebpf", "packet")
"""What `open_engine` takes. auto: the first of the others that runs here."""


class Engine(Protocol):
    """An open source of records, until the end of its context. For one thread at a time.

    `opening` and `closing` are TAIL arrays for Account.open() and .close(). They say for each CPU
    where its stream began, and how far catch_up() or finish() have read.
    """

    name: str
    instance: int
    group: str
    """What records come from now: "packets" one by one, or sums from "flows"."""
    opening: np.ndarray
    closing: np.ndarray
    awaited: Callable[[], bool]
    """Whether somebody waits for the reader, so that read() should return soon. The reader's."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def read(self, timeout: float) -> Iterable[Event]:
        """Yield events that are there; wait up to `timeout` s for the first.

        A Batch is a view, and the next step of the iteration overwrites it: copy it to keep it.
        Raises NoModule when the module is gone, Error when the kernel sends nonsense.
        """
        ...

    def wake(self) -> None:
        """End a read() that would wait longer than 0.1 s. From any thread, also after the end."""
        ...

    def want_first_bytes(self, wanted: bool) -> bool:
        """Start or stop sending packets' first bytes; return whether it can. From any thread."""
        ...

    def want_packets(self, wanted: bool) -> None:
        """Change to single packets, or to sums of flows if the source has them; no record twice.

        Afterwards `group` says what new records come from, and `opening` where they begin. A source
        that has only packets does nothing. Raises what read() raises.
        """
        ...

    def catch_up(self) -> Iterable[Event]:
        """Yield everything that was recorded until now. Afterwards `closing` is set.

        The bound is the position of the stream now, not a time. So a flood does not prolong it.
        """
        ...

    def begin(self) -> int:
        """Restart the stream here: `opening` is set again. Returns CLOCK_MONOTONIC ns."""
        ...

    def finish(self, until_ns: int | None = None) -> Iterable[Event]:
        """Yield the rest of the stream. Afterwards `closing` is set, and the stream has ended.

        `until_ns`: when another engine began. Engine packet leaves out later packets.
        """
        ...

    def stats(self) -> dict[str, object]:
        """Return the engine's own figures, for JSON."""
        ...


def open_engine(
    name: str,
    notify: Callable[[str], None],
    *,
    ring_bytes: int | None = None,
    holders: Holders | None = None,
    finder: Finder | None = None,
) -> Engine:
    """Open the engine called `name`; "auto" is the module if it is loaded, else `ebpf` or `packet`.

    `ring_bytes`: room for waiting packets in engine packet (16 MiB). `holders` and `finder`: shared
    by all of this program that ask who holds a socket, and which namespaces there are. `notify`
    gets a line of text about each thing that makes the result worse. Raises UsageError for another
    name, NoModule, NoBpf, NoPrivilege.
    """
    if name not in ENGINES:
        raise UsageError(f"no engine '{name}': it is one of {', '.join(ENGINES)}")
    if name in ("auto", "module"):
        # Imported here, because a caller needs only one engine.
        from nlproto.engines.module import ModuleEngine

        try:
            return ModuleEngine(notify=notify)
        except NoModule:
            if name == "module":
                raise NoModule(
                    f"sniffer.ko does not answer; {advice().text}; or use --engine packet"
                ) from None
        except NoPrivilege:
            if name == "module":
                raise
    why = ""
    if name in ("auto", "ebpf"):
        from nlproto.engines.ebpf import EbpfEngine
        from nlproto.kernel.bpf import NoBpf

        try:
            return EbpfEngine(notify, finder=finder)
        except NoBpf as error:
            if name == "ebpf":
                raise NoBpf(f"engine ebpf cannot run: {error}; or use --engine packet") from error
            why = str(error)
    from nlproto.engines.packet import RING_BYTES, PacketEngine

    engine = PacketEngine(
        notify, ring_bytes=ring_bytes or RING_BYTES, holders=holders, finder=finder
    )
    if name == "auto":
        notify(
            f"engine packet: without sniffer.ko, or eBPF ({why}), sockets that live a few"
            f" milliseconds stay unnamed; {advice().text}"
        )
    return engine
