# SPDX-License-Identifier: MIT
"""Ground truth: what each worker says about its own packets, while it makes them.

A claim says: "packets with this local endpoint, in this network namespace, from t0 on
are mine". Workers append claims to one file as JSON lines; each line is one write(2) with
O_APPEND, so that many processes share the file without a lock. The C workers write the
same lines (c/truth.h). Nothing here knows anything of the engine that is judged.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

SO_COOKIE = 57
SO_NETNS_COOKIE = 71
FOREVER = 1 << 63


@dataclass(frozen=True, slots=True)
class Identity:
    """A process: pid in the initial namespace and start time in clock ticks since boot."""

    pid: int
    start: int
    comm: str


@dataclass(slots=True)
class Claim:
    """Packets of one local endpoint, and whose they are.

    ``pid`` 0 claims them for nobody: then ``reasons`` are the only right answers. ``out``
    and ``in_`` are packets that the worker knows it sent and was sent; ``exact`` says
    whether more would be too many. Times are CLOCK_MONOTONIC nanoseconds.
    """

    ident: str
    role: str
    pid: int
    start: int
    comm: str
    netns: int
    proto: str
    lport: int
    laddr: str = ""
    raddr: str = ""
    rport: int = 0
    dirs: str = "io"
    lens: tuple[int, ...] = ()
    t0: int = 0
    t1: int = FOREVER
    reasons: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    cookies: set[int] = field(default_factory=set)
    out: int = 0
    in_: int = 0
    exact: bool = False

    @property
    def specificity(self) -> int:
        """A claim that says more about the packet wins over one that says less."""
        return 4 * bool(self.lens) + 2 * bool(self.rport) + bool(self.laddr)


def now() -> int:
    """CLOCK_MONOTONIC in nanoseconds: the clock of the records."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def identity() -> Identity:
    """Who the caller is, as the initial pid namespace sees it.

    /proc here is the initial namespace's mount. Its "self" resolves to the pid there even
    for a process in a nested pid namespace.
    """
    pid = int(os.readlink("/proc/self"))
    return identity_of(pid)


def identity_of(pid: int) -> Identity:
    """Identity of process ``pid`` (proc(5), /proc/PID/stat fields 2 and 22)."""
    text = Path(f"/proc/{pid}/stat").read_text(errors="surrogateescape")
    comm = text[text.index("(") + 1 : text.rindex(")")]
    return Identity(pid, int(text[text.rindex(")") + 2 :].split()[19]), comm)


def netns_inode() -> int:
    """Inode of the caller's network namespace."""
    return os.stat("/proc/thread-self/ns/net").st_ino


def cookie(sock: socket.socket) -> int:
    """SO_COOKIE of a socket."""
    value: int = struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0]
    return value


class Writer:
    """Appends claims to the truth file; inherited by forked workers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._next = 0

    def write(self, **event: object) -> None:
        """One event, one line, one write."""
        os.write(self._fd, json.dumps(event).encode() + b"\n")

    def ident(self) -> str:
        """A claim's name, unique over all processes that share the file."""
        self._next += 1
        return f"{os.getpid()}.{self._next}.{now()}"


def plain(address: str) -> str:
    """Address as the record has it: IPv4 when it is IPv4 mapped into IPv6, empty for any."""
    address = address.split("%")[0].removeprefix("::ffff:")
    return "" if address in ("0.0.0.0", "::") else address


class Worker:
    """What a worker process needs to tell the truth about itself."""

    def __init__(self, role: str, writer: Writer) -> None:
        self.role = role
        self._writer = writer
        self.me = identity()

    def again(self) -> None:
        """Take a new identity: after fork, or after a change of comm."""
        self.me = identity()

    def claim(
        self,
        sock: socket.socket,
        *,
        t0: int | None = None,
        remote: tuple[str, int] | None = None,
        dirs: str = "io",
        lens: Iterable[int] = (),
        out: int = 0,
        in_: int = 0,
        exact: bool = False,
        flags: Iterable[str] = (),
        reasons: Iterable[str] = (),
        proto: str = "",
        netns: int = 0,
        any_address: bool = False,
        has_cookie: bool = True,
    ) -> str:
        """Claim the packets of a bound socket for this process; returns the claim's name.

        ``lens`` are IP lengths. ``flags`` must be set on records ("dead", "ambiguous");
        ``reasons`` are the honest ways not to name one of these packets. ``has_cookie`` is
        False where packets do not carry the cookie of this socket (MPTCP: its subflows').
        """
        name = sock.getsockname()
        if not proto:
            proto = "udp" if sock.type == socket.SOCK_DGRAM else "tcp"
        event: dict[str, object] = {
            "ev": "claim",
            "ident": self._writer.ident(),
            "role": self.role,
            "pid": self.me.pid,
            "start": self.me.start,
            "comm": self.me.comm,
            "netns": netns or netns_inode(),
            "proto": proto,
            "laddr": "" if any_address else plain(name[0]),
            "lport": name[1],
            "raddr": plain(remote[0]) if remote else "",
            "rport": remote[1] if remote else 0,
            "dirs": dirs,
            "lens": list(lens),
            "t0": now() if t0 is None else t0,
            "reasons": list(reasons),
            "flags": list(flags),
            "cookies": [cookie(sock)] if has_cookie else [],
            "out": out,
            "in_": in_,
            "exact": exact,
        }
        self._writer.write(**event)
        return str(event["ident"])

    def claim_port(
        self, port: int, *, proto: str = "udp", dirs: str = "o", rport: int = 0, out: int = 0,
        in_: int = 0, exact: bool = False, t0: int | None = None, lens: Iterable[int] = (),
        raddr: str = "", laddr: str = "", reasons: Iterable[str] = (), flags: Iterable[str] = (),
        netns: int = 0, owner: Identity | None = None,
    ) -> str:  # fmt: skip
        """Claim a port without a socket of ours bound to it (raw sockets, subflows), for this
        process or for ``owner``."""
        owner = owner or self.me
        ident = self._writer.ident()
        self._writer.write(
            ev="claim", ident=ident, role=self.role, pid=owner.pid, start=owner.start,
            comm=owner.comm, netns=netns or netns_inode(), proto=proto, laddr=laddr, lport=port,
            raddr=raddr, rport=rport, dirs=dirs, lens=list(lens), t0=now() if t0 is None else t0,
            reasons=list(reasons), flags=list(flags), cookies=[], out=out, in_=in_, exact=exact,
        )  # fmt: skip
        return ident

    def claim_nobody(
        self,
        *,
        proto: str,
        lport: int,
        reasons: Iterable[str],
        rport: int = 0,
        dirs: str = "io",
        lens: Iterable[int] = (),
        netns: int = 0,
        t0: int = 0,
        out: int = 0,
        in_: int = 0,
        exact: bool = False,
    ) -> str:
        """Say that packets of an endpoint belong to no process, and which reasons are right.

        For forwarded packets ``lport`` is the source and ``rport`` the destination port.
        """
        ident = self._writer.ident()
        self._writer.write(
            ev="claim", ident=ident, role=self.role, pid=0, start=0, comm="",
            netns=netns or netns_inode(), proto=proto, lport=lport, rport=rport, dirs=dirs,
            lens=list(lens), t0=t0, reasons=list(reasons), flags=[], cookies=[], out=out,
            in_=in_, exact=exact,
        )  # fmt: skip
        return ident

    def count(self, ident: str, *, out: int = 0, in_: int = 0) -> None:
        """Add packets that were really sent (or sent to us) to a claim."""
        self._writer.write(ev="count", ident=ident, out=out, in_=in_)

    def also(self, ident: str, sock: socket.socket) -> None:
        """Packets of the claim may carry this socket's cookie too (accepted from a listener)."""
        self._writer.write(ev="cookie", ident=ident, cookie=cookie(sock))

    def end(self, ident: str, t1: int | None = None) -> None:
        """The claim ends: no packet after this is ours."""
        self._writer.write(ev="end", ident=ident, t1=now() if t1 is None else t1)


def load(path: Path) -> list[Claim]:
    """All claims of a truth file, with counts, cookies and ends applied.

    :raises ValueError: an event names a claim that is not there.
    """
    claims: dict[str, Claim] = {}
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        if event.pop("ev") == "claim":
            event["cookies"] = set(event["cookies"])
            for key in ("lens", "reasons", "flags"):
                event[key] = tuple(event[key])
            claims[event["ident"]] = Claim(**event)
            continue
        if event["ident"] not in claims:
            raise ValueError(f"{path}: no claim {event['ident']}")
        claim = claims[event["ident"]]
        claim.out += event.get("out", 0)
        claim.in_ += event.get("in_", 0)
        claim.t1 = min(claim.t1, event.get("t1", FOREVER))
        if "cookie" in event:
            claim.cookies.add(event["cookie"])
    return list(claims.values())
