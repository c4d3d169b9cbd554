# SPDX-License-Identifier: MIT
"""Engines: where records come from. `ebpf` follows the rules of `module`, `packet` has its own."""

from collections.abc import Callable, Iterable
from typing import Protocol, Self

import numpy as np

from nlproto.errors import NoModule, NoPrivilege, UsageError
from nlproto.host.holders import Holders
from nlproto.kernel.loading import advice
from nlproto.records.wire import Event

__all__ = ["ENGINES", "Engine", "Event", "open_engine"]

ENGINES = ("auto", "module", "ebpf", "packet")


class Engine(Protocol):
    """A source of records that is open from its construction to the end of its context.

    One thread at a time. `opening` and `closing` are TAIL arrays for Account.open and .close.
    They say for each CPU where its stream began, and how far catch_up() or finish() have read.
    """

    name: str
    instance: int
    group: str
    """Where records come from now: "packets", or "flows" and summed up."""
    opening: np.ndarray
    closing: np.ndarray

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def read(self, timeout: float) -> Iterable[Event]:
        """Yield what there is, waiting up to `timeout` s for the first.

        A Batch is a view that the next step of the iteration overwrites: copy it to keep it.
        Raises NoModule when the module is gone, Error when the kernel sends nonsense.
        """
        ...

    def want_first_bytes(self, wanted: bool) -> bool:
        """Send the first bytes of packets too, or no more; whether it can. From any thread."""
        ...

    def want_packets(self, wanted: bool) -> None:
        """Go over to packets one by one, or to flows where the source sums up, each record once.

        Afterwards `group` is from where records come that are made from now on, `opening` where
        they begin. A source that always tells of packets does nothing. Raises as read().
        """
        ...

    def catch_up(self) -> Iterable[Event]:
        """Yield everything that was recorded until now; afterwards `closing` is set.

        Bounded by where the stream stands now: not by a time, and a flood does not prolong it.
        """
        ...

    def begin(self) -> int:
        """Restart the stream here: `opening` is set anew. Returns CLOCK_MONOTONIC ns."""
        ...

    def finish(self, until_ns: int | None = None) -> Iterable[Event]:
        """Yield the rest of the stream; afterwards `closing` is set and it has ended.

        `until_ns`: when another engine began; engine packet leaves out what came since.
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
) -> Engine:
    """Return the engine called `name`; "auto" is the module when loaded, else `ebpf` or `packet`.

    `ring_bytes`: what engine packet has for packets that wait (16 MiB). `holders`: who holds a
    socket, where others of this program ask too. `notify` gets one plain line for each thing that
    makes the result less than it could be.
    Raises UsageError for another name, NoModule, NoBpf, NoPrivilege.
    """
    if name not in ENGINES:
        raise UsageError(f"no engine '{name}': it is one of {', '.join(ENGINES)}")
    if name in ("auto", "module"):
        # Imported here: each engine is of no use to who takes the other.
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
        from nlproto.engines.bpf import NoBpf
        from nlproto.engines.ebpf import EbpfEngine

        try:
            return EbpfEngine(notify)
        except NoBpf as error:
            if name == "ebpf":
                raise NoBpf(f"engine ebpf cannot run: {error}; or use --engine packet") from error
            why = str(error)
    from nlproto.engines.packet import RING_BYTES, PacketEngine

    engine = PacketEngine(notify, ring_bytes=ring_bytes or RING_BYTES, holders=holders)
    if name == "auto":
        notify(
            f"engine packet: without sniffer.ko, or eBPF ({why}), sockets that live a few"
            f" milliseconds stay unnamed; {advice().text}"
        )
    return engine
