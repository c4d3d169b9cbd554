# SPDX-License-Identifier: MIT
"""Answers to questions, as far as the one who asks may see."""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from daemon.history import End, History, Question, flow_fields
from daemon.now import holder, sockets_now
from daemon.requests import History as HistoryRequest
from daemon.requests import Key, Lookup, OwnerOf, Who
from nlproto.bound import KernelSockets
from nlproto.errors import UsageError
from nlproto.flows import pack_address
from nlproto.pipeline import Pipeline
from nlproto.portmap import Owner
from nlproto.processes import Process
from nlproto.wire import PROTO_NAMES

__all__ = ["Answers", "Past", "PROTOS"]

PROTOS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}

Past = Callable[[Question], tuple[int, list[tuple[int, np.void]]]]
"""Answers a Question from the stored history: rows that are not in memory."""


@dataclass(slots=True)
class Answers:
    """`uid` of each method: None for one who sees everything, else the only owner to be shown."""

    pipeline: Pipeline
    history: History
    past: Past | None = None
    past_process: Callable[[int, int], Process | None] | None = None
    kernel: KernelSockets | None = None
    remembers_since: Callable[[], float] = time.time
    """Unix time: what was seen later is still known."""

    def owner(self, request: OwnerOf, uid: int | None) -> dict[str, Any]:
        address = None if request.address is None else _address(request.address)
        return {"owners": self._owners(request.port, _proto(request.proto), address, uid)}

    def _owners(
        self, port: int, proto: int | None, address: tuple[int, bytes] | None, uid: int | None
    ) -> list[dict[str, Any]]:
        portmap = self.pipeline.portmap
        if portmap is None:
            return []
        return self._grouped(portmap.who(port, proto, address), uid)

    def _grouped(self, owners: Iterable[Owner], uid: int | None) -> list[dict[str, Any]]:
        """One entry a socket: the last seen owner, all of them as holders."""
        sockets: dict[tuple[Any, ...], dict[str, Any]] = {}
        for owner in owners:
            if uid is not None and owner.uid != uid:
                continue
            name = (owner.netns, owner.proto, owner.address, owner.port, owner.cookie)
            entry = sockets.get(name)
            if entry is None:
                sockets[name] = entry = self._owner_fields(owner)
            entry["holders"].append(holder(owner.tgid, owner.start_ns, owner.comm, owner.uid))
        return list(sockets.values())

    def _owner_fields(self, owner: Owner) -> dict[str, Any]:
        process = self.pipeline.processes.get(owner.tgid, owner.start_ns)
        return {
            "netns": owner.netns,
            "proto": PROTO_NAMES.get(owner.proto, str(owner.proto)),
            "address": owner.address,
            "port": owner.port,
            "pid": owner.tgid,
            "start_ns": owner.start_ns,
            "comm": owner.comm or (process.comm if process else ""),
            "uid": owner.uid,
            "exe": process.exe if process else "",
            "cookie": owner.cookie,
            "listening": owner.listening,
            "holders": [],
        }

    def who(self, request: Who, uid: int | None, now_ns: int | None = None) -> dict[str, Any]:
        """Sockets there now that fit, flows of the past, and details of all processes named."""
        now_ns = time.time_ns() if now_ns is None else now_ns
        network = None if request.host is None else _network(request.host)
        asked_uid = getattr(request, "uid", None)
        if uid is not None and asked_uid not in (None, uid):
            asked_uid = -1  # nobody: the answer is empty, not an error that tells something
        elif uid is not None:
            asked_uid = uid
        question = Question(
            port=request.port,
            proto=_proto(request.proto),
            host=network,
            pid=request.pid,
            pname=request.pname,
            uid=asked_uid,
            since_ns=None if request.since is None else now_ns - int(request.since * 1e9),
            at_ns=None if request.at is None else int(request.at * 1e9),
            ends=None if request.ends is None else _ends(*request.ends),
            limit=request.limit,
        )
        total, rows = self._ask(question)
        flows = [flow_fields(flow) for _, flow in rows]
        owners: list[dict[str, Any]] = []
        owners_total = 0
        if request.at is None and not isinstance(request, HistoryRequest):
            owners_total, owners = self._owners_now(question, uid)
        return {
            "owners": owners,
            "owners_total": owners_total,
            "complete": self.kernel is None or self.kernel.looked_ns > 0,
            "since": self.remembers_since(),
            "flows": flows,
            "total": total,
            "truncated": total > len(flows),
            "processes": self._processes(flows, owners, uid),
        }

    def _ask(self, question: Question) -> tuple[int, list[tuple[int, np.void]]]:
        total, rows = self.history.ask(question)
        if self.past is None:
            return total, rows
        older_total, older = self.past(question)
        rows = sorted(rows + older, key=lambda row: -int(row[1]["last_ns"]))
        return total + older_total, rows[: question.limit]

    def _owners_now(self, question: Question, uid: int | None) -> tuple[int, list[dict[str, Any]]]:
        """How many sockets there are now, and the first of them."""
        if self.kernel is None:
            return 0, []
        total, found = sockets_now(self.pipeline, self.kernel, question, uid)
        for one in found:
            process = self.pipeline.processes.get(one["pid"], one["start_ns"])
            one["exe"] = process.exe if process else ""
        return total, found

    def _processes(
        self, flows: list[dict[str, Any]], owners: list[dict[str, Any]], uid: int | None
    ) -> list[Process]:
        keys = {(flow["pid"], flow["start_ns"]) for flow in flows if flow["pid"] is not None}
        for owner in owners:
            keys.update((holder["pid"], holder["start_ns"]) for holder in owner["holders"])
        found = []
        for key in keys:
            process = self.pipeline.processes.get(*key)
            if process is None and self.past_process is not None:
                process = self.past_process(*key)
            if process is not None and (uid is None or process.uid == uid):
                found.append(process)
        return found

    def lookup(self, request: Lookup, uid: int | None) -> dict[str, Any]:
        cookies = {key.cookie for key in request.keys if key.cookie is not None}
        portmap = self.pipeline.portmap
        by_cookie = {} if portmap is None or not cookies else portmap.with_cookies(cookies)
        return {"owners": [self._look_up(key, by_cookie, uid) for key in request.keys]}

    def _look_up(
        self, key: Key, by_cookie: Mapping[int, list[Owner]], uid: int | None
    ) -> dict[str, Any] | None:
        given = {name for name in key.__struct_fields__ if getattr(key, name) is not None}
        processes, portmap = self.pipeline.processes, self.pipeline.portmap
        owners: list[Owner] = []
        match key:
            case Key(tgid=int(tgid), start_ns=int(start_ns)) if len(given) == 2:
                process = processes.get(tgid, start_ns)
                if process is None or (uid is not None and process.uid != uid):
                    return None
                return {"process": process}
            case Key(cookie=int(cookie)) if len(given) == 1:
                owners = by_cookie.get(cookie, [])
            case Key(netns=int(netns), proto=str(proto), address=str(address), port=int(port)) if (
                len(given) == 4
            ):
                family, raw = _address(address)
                if portmap is not None:
                    owners = portmap.at((netns, PROTOS[proto], family, raw, port))
            case _:
                raise UsageError(
                    "a lookup key is {cookie}, {netns, proto, address, port} or {tgid, start_ns}"
                )
        found = self._grouped(owners, uid)
        if not found:
            return None
        process = processes.get(found[0]["pid"], found[0]["start_ns"])
        if process is not None and (uid is None or process.uid == uid):
            found[0]["process"] = process
        return found[0]


def _proto(name: str | None) -> int | None:
    return None if name is None else PROTOS[name]


def _address(text: str) -> tuple[int, bytes]:
    try:
        return pack_address(text)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _ends(*ends: tuple[str, int]) -> tuple[End, End]:
    one, other = ((*_address(address), port) for address, port in ends)
    return one, other


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise UsageError(f"'{text}' is neither an IP address nor a network") from None
