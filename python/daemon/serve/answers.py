# SPDX-License-Identifier: MIT
"""Answers to questions, limited to what the user may see."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from daemon.history.memory import FlowEnd, FlowMemory, Question, flow_fields
from daemon.history.recorder import Recorder
from daemon.serve.now import Looking, holder, sockets_now
from daemon.serve.questions import StopIfGone
from daemon.serve.requests import HistoryRequest, Lookup, LookupKey, News, OwnerOf, Usage, Who
from daemon.serve.usage import Sums, usage
from nlproto.errors import UsageError
from nlproto.host.kernel_sockets import KernelSockets
from nlproto.kernel.drop_reasons import Dropped
from nlproto.overheard.names import is_of_resolver, number_of
from nlproto.overheard.translations import Translations
from nlproto.pipeline.pipeline import Pipeline
from nlproto.records.wire import PROTO_NAMES, PROTO_NUMBERS
from nlproto.tables.flows import pack_address
from nlproto.tables.port_owner import PortOwner
from nlproto.tables.processes import Process

__all__ = ["Answers", "Past", "Room"]


Past = Callable[[Question, StopIfGone], tuple[int, list[tuple[int, np.void]]]]
"""Answers a Question from the stored history, with rows that are not in memory."""

_MAX_HOLDERS = 20_000
"""The most processes of the port map in one answer: a socket has one for each holder."""
_CHEAP = 32
_NULL = msgspec.Raw(b"null")

_json = msgspec.json.Encoder()


class Room:
    """The most bytes of JSON in an answer. What has no room is left out, and the answer says so."""

    def __init__(self, size: int = 8 << 20) -> None:
        self.left = size
        self.truncated = False

    def take(self, encoded: bytes) -> bool:
        """Return whether there was room for it."""
        if len(encoded) + 1 > self.left:
            self.truncated = True
            return False
        self.left -= len(encoded) + 1
        return True

    def fill(self, things: Iterable[object]) -> list[msgspec.Raw]:
        """Return as many of `things`, from the first on, as there is room for."""
        fitting = []
        for thing in things:
            encoded = _json.encode(thing)
            if not self.take(encoded):
                break
            fitting.append(msgspec.Raw(encoded))
        return fitting


def _never() -> None:
    pass


class Looks(Protocol):
    """Looks at the kernel's sockets (daemon.system.watcher)."""

    @property
    def is_fresh(self) -> bool:
        """Whether the last look was within a second."""
        ...

    def refresh(self, stop: StopIfGone, full: bool = False) -> None:
        """Return when it was. `full`: for a user who sees everything."""
        ...


@dataclass(slots=True)
class Answers:
    """Answers questions. Lists in an answer hold JSON. For any thread.

    `uid` of each method is the only owner to show; None: a user who sees everything.
    """

    pipeline: Pipeline
    history: FlowMemory
    past: Past | None = None
    past_process: Callable[[int, int], Process | None] | None = None
    kernel: KernelSockets | None = None
    looks: Looks | None = None
    remembers_since: Callable[[int | None], float] = lambda uid: time.time()
    """Return a Unix time: this user still sees everything since then."""
    name_of: Callable[[int], str] = lambda number: ""
    """Return the name of a flow's far end."""
    translations: Translations | None = None
    """The present translations by NAT."""
    recorder: Recorder | None = None
    dropped: Callable[[], Dropped] = dict
    """Return why packets were dropped at the present sockets."""
    sums: Sums = lambda since_ns, stop: ({}, {})

    def is_cheap(self, request: OwnerOf, uid: int | None) -> bool:
        """Return whether the answer takes less time than to wake another thread.

        Only the user's own sockets count: the time would tell how many others have the port.
        """
        portmap = self.pipeline.portmap
        if self.looks is not None and not self.looks.is_fresh:
            return False
        return portmap is None or portmap.count(request.port, uid) <= _CHEAP

    def _refresh(self, stop: StopIfGone, uid: int | None) -> None:
        if self.looks is not None:
            self.looks.refresh(stop, uid is None)

    def owner(
        self, request: OwnerOf, uid: int | None, stop: StopIfGone = _never, room: Room | None = None
    ) -> dict[str, Any]:
        self._refresh(stop, uid)
        room = Room() if room is None else room
        address = None if request.address is None else _address(request.address)
        portmap, proto = self.pipeline.portmap, _proto(request.proto)
        owners: list[PortOwner] = []
        if portmap is not None:
            owners = portmap.who(request.port, proto, address, uid, _MAX_HOLDERS + 1)
        room.truncated = self.kernel is not None and self.kernel.is_behind(uid)
        grouped = self._grouped(owners, stop, room)
        return {"owners": room.fill(grouped), "truncated": room.truncated}

    def _grouped(
        self, owners: Sequence[PortOwner], stop: StopIfGone, room: Room
    ) -> list[dict[str, Any]]:
        """Return one entry for each socket: the last seen owner, with all of them as holders."""
        sockets: dict[tuple[Any, ...], dict[str, Any]] = {}
        if len(owners) > _MAX_HOLDERS:
            room.truncated = True
        for owner in owners[:_MAX_HOLDERS]:
            stop()
            name = (owner.netns, owner.proto, owner.address, owner.port, owner.cookie)
            entry = sockets.get(name)
            if entry is None:
                sockets[name] = entry = self._owner_fields(owner)
            entry["holders"].append(holder(owner.tgid, owner.start_ns, owner.comm, owner.uid))
        return list(sockets.values())

    def _owner_fields(self, owner: PortOwner) -> dict[str, Any]:
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

    def who(
        self,
        request: Who,
        uid: int | None,
        now_ns: int | None = None,
        stop: StopIfGone = _never,
        room: Room | None = None,
    ) -> dict[str, Any]:
        """Return sockets and flows that fit, and details of all processes named."""
        room = Room() if room is None else room
        now_ns = time.time_ns() if now_ns is None else now_ns
        network = None if request.host is None else _network(request.host)
        asked_uid = getattr(request, "uid", None)
        if uid is not None and asked_uid not in (None, uid):
            asked_uid = -1  # nobody: an error would give something away
        elif uid is not None:
            asked_uid = uid
        question = Question(
            port=request.port,
            proto=_proto(request.proto),
            host=network,
            pid=request.pid,
            pname=request.pname,
            domains=None if request.domain is None else _numbers(request.domain, uid is None),
            uid=asked_uid,
            since_ns=None if request.since is None else now_ns - int(request.since * 1e9),
            until_ns=None if request.until is None else now_ns - int(request.until * 1e9),
            at_ns=None if request.at is None else int(request.at * 1e9),
            seen_until_ns=None if request.seen_until is None else int(request.seen_until * 1e9),
            ends=None if request.ends is None else _ends(*request.ends),
            netns=request.netns,
            listening=request.listening,
            limit=request.limit,
        )
        total, rows = (0, []) if request.listening else self._ask(question, stop)
        owners: list[dict[str, Any]] = []
        owners_total = 0
        present = (request.at, request.domain, request.seen_until) == (None, None, None)
        of_now = present and not request.until
        if of_now and not isinstance(request, HistoryRequest):
            self._refresh(stop, uid)
            looking = Looking(uid, stop)
            owners_total, owners = self._owners_now(question, looking)
            room.truncated |= looking.truncated
        owners_now = room.fill(owners)
        keys: dict[tuple[int, int], None] = {}
        for owner in owners[: len(owners_now)]:
            keys.update(((one["pid"], one["start_ns"]), None) for one in owner["holders"])

        def fields() -> Iterable[dict[str, Any]]:
            for _, row in rows:
                stop()
                flow = flow_fields(row) | {"domain": self._domain(int(row["domain"]), uid)}
                if flow["pid"] is not None:
                    keys[flow["pid"], flow["start_ns"]] = None
                yield flow

        flows = room.fill(fields())
        truncated = room.truncated or total > len(flows) or owners_total > len(owners_now)
        room.truncated = False
        processes = room.fill(self._processes(keys, uid, stop))
        return {
            "owners": owners_now,
            "owners_total": owners_total,
            "complete": self.kernel is None or self.kernel.looked_ns > 0,
            "since": self.remembers_since(uid),
            "flows": flows,
            "total": total,
            "processes": processes,
            "processes_cut": room.truncated,
            "nat_cut": self.translations is not None and self.translations.cut,
            "truncated": truncated or room.truncated,
        }

    def usage(
        self, request: Usage, uid: int | None, stop: StopIfGone = _never, room: Room | None = None
    ) -> dict[str, Any]:
        """Return who used how much (daemon.serve.usage)."""
        room = Room() if room is None else room
        found = usage(request, uid, self.sums, self.name_of, stop)
        rows = room.fill(found["usage"])
        return found | {"usage": rows, "since": self.remembers_since(uid)}

    def news(
        self, request: News, uid: int | None, stop: StopIfGone = _never, room: Room | None = None
    ) -> dict[str, Any]:
        """Return what was first seen since then, each with its process if that is known."""
        room = Room() if room is None else room
        if self.recorder is None:
            raise UsageError("only a history on disk knows what is new")
        since_ns = max(0, time.time_ns() - int(request.since * 1e9))
        unseen_ns, limit = int(request.unseen * 1e9), request.limit
        page = limit + 1, request.after
        found, places = self.recorder.news(request.kind, since_ns, unseen_ns, uid, *page)
        keys = {(one["pid"], one["start_ns"]): None for one in found[:limit]}
        news = room.fill(found[:limit])
        return {
            "news": news,
            "processes": room.fill(self._processes(keys, uid, stop)),
            "since": self.recorder.known_since(),
            "truncated": room.truncated or len(found) > limit,
            "next": places[len(news) - 1] if 0 < len(news) < len(found) else None,
        }

    def _domain(self, number: int, uid: int | None) -> str:
        """Return the name, unless a resolver asked for it and this user may not see it."""
        if not number or (uid is not None and is_of_resolver(number)):
            return ""
        return self.name_of(number)

    def _ask(self, question: Question, stop: StopIfGone) -> tuple[int, list[tuple[int, np.void]]]:
        total, rows = self.history.ask(question)
        if self.past is None:
            return total, rows
        older_total, older = self.past(question, stop)
        rows = sorted(rows + older, key=lambda row: -int(row[1]["last_ns"]))
        return total + older_total, rows[: question.limit]

    def _owners_now(self, question: Question, looking: Looking) -> tuple[int, list[dict[str, Any]]]:
        """Return how many present sockets fit, and the first of them."""
        if self.kernel is None:
            return 0, []
        total, found = sockets_now(self.pipeline, self.kernel, question, looking, self.translations)
        looking.truncated |= self.kernel.is_behind(looking.uid)
        dropped = self.dropped()
        for one in found:
            looking.stop()
            # 0 stands for all sockets that are not known, also those of others
            one["drop_reasons"] = dropped.get(one["cookie"], {}) if one["cookie"] else {}
            processes = self.pipeline.processes
            for held_by in one["holders"]:
                if not held_by["uid"]:  # what is in /proc about a user's process may hang
                    processes.add(held_by["pid"], held_by["start_ns"], held_by["comm"], 0)
            process = processes.get(one["pid"], one["start_ns"])
            one["exe"] = process.exe if process else ""
        return total, found

    def _processes(
        self, keys: Iterable[tuple[int, int]], uid: int | None, stop: StopIfGone
    ) -> Iterable[Process]:
        for key in keys:
            stop()
            process = self.pipeline.processes.get(*key)
            if process is None and self.past_process is not None:
                process = self.past_process(*key)
            if process is not None and (uid is None or process.uid == uid):
                yield process

    def lookup(
        self, request: Lookup, uid: int | None, stop: StopIfGone = _never, room: Room | None = None
    ) -> dict[str, Any]:
        self._refresh(stop, uid)
        room = Room() if room is None else room
        cookies = {key.cookie for key in request.keys if key.cookie is not None}
        portmap = self.pipeline.portmap
        by_cookie: Mapping[int, list[PortOwner]] = {}
        if portmap is not None and cookies:
            by_cookie = portmap.with_cookies(cookies, uid, _MAX_HOLDERS + 1)
            room.truncated = sum(map(len, by_cookie.values())) > _MAX_HOLDERS
        made: dict[LookupKey, msgspec.Raw] = {}
        owners = []
        for key in request.keys:
            stop()
            found = made.get(key)
            if found is None:
                answer = self._look_up(key, by_cookie, uid, stop, room)
                found = made[key] = _NULL if answer is None else msgspec.Raw(_json.encode(answer))
            owners.append(found if room.take(bytes(found)) else _NULL)
        return {"owners": owners, "truncated": room.truncated}

    def _look_up(
        self,
        key: LookupKey,
        by_cookie: Mapping[int, list[PortOwner]],
        uid: int | None,
        stop: StopIfGone,
        room: Room,
    ) -> dict[str, Any] | None:
        given = {name for name in key.__struct_fields__ if getattr(key, name) is not None}
        processes, portmap = self.pipeline.processes, self.pipeline.portmap
        owners: list[PortOwner] = []
        match key:
            case LookupKey(tgid=int(tgid), start_ns=int(start_ns)) if len(given) == 2:
                process = processes.get(tgid, start_ns)
                if process is None or (uid is not None and process.uid != uid):
                    return None
                return {"process": process}
            case LookupKey(cookie=int(cookie)) if len(given) == 1:
                owners = by_cookie.get(cookie, [])
            case LookupKey(
                netns=int(netns), proto=str(proto), address=str(address), port=int(port)
            ) if len(given) == 4:
                family, raw = _address(address)
                if portmap is not None:
                    end = (netns, PROTO_NUMBERS[proto], family, raw, port)
                    owners = portmap.at(end, uid, _MAX_HOLDERS + 1)
            case _:
                raise UsageError(
                    "a lookup key is {cookie}, {netns, proto, address, port} or {tgid, start_ns}"
                )
        found = self._grouped(owners, stop, room)
        if not found:
            return None
        process = processes.get(found[0]["pid"], found[0]["start_ns"])
        if process is not None and (uid is None or process.uid == uid):
            found[0]["process"] = process
        return found[0]


def _proto(name: str | None) -> int | None:
    return None if name is None else PROTO_NUMBERS[name]


def _numbers(domain: str, everything: bool) -> tuple[int, ...]:
    """Return the numbers of `domain` in flows.

    Names from the process's own questions, or for users who may see it from a resolver's."""
    name = domain.lower().rstrip(".")
    return tuple(number_of(name, one) for one in (False, True)[: 1 + everything])


def _address(text: str) -> tuple[int, bytes]:
    try:
        return pack_address(text)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _ends(*ends: tuple[str, int]) -> tuple[FlowEnd, FlowEnd]:
    one, other = ((*_address(address), port) for address, port in ends)
    return one, other


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise UsageError(f"'{text}' is neither an IP address nor a network") from None
