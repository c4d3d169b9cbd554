# SPDX-License-Identifier: MIT
"""One row of flows as a log record of OTLP, in its JSON form.

Names are from OpenTelemetry's semantic conventions (network, source, destination, process,
container, k8s, host). Where it has none, they are from ECS (bytes, packets, direction,
community_id, user). All others are under `packet_hunter`. ECS's `process.executable` is left out:
an index cannot have it beside `process.executable.path`.
https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fleet.wire import ToldProcess
from nlproto import __version__
from nlproto.records.community_id import community_id
from nlproto.records.wire import HOW_NAMES, PROTO_NAMES, address_text, text
from nlproto.tables.flows import address_bytes

__all__ = ["record_of", "request_of"]

Value = str | int | bool | Sequence[str]

_INFO = 9
"""SEVERITY_NUMBER_INFO."""


def request_of(host: str, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the body of one request: an ExportLogsServiceRequest."""
    resource = {"host.name": host, "service.name": "packet-hunter"}
    scope = {"name": "packet-hunter", "version": __version__}
    return {
        "resourceLogs": [
            {
                "resource": {"attributes": _attributes(resource)},
                "scopeLogs": [{"scope": scope, "logRecords": list(records)}],
            }
        ]
    }


def record_of(
    flow: np.void, process: ToldProcess | None, domain: str, now_ns: int
) -> dict[str, Any]:
    """Return the log record of a FLOW with times in ns since 1970, without unknown values.

    The source is the end that sent the SYN. Where that is not known it is the end with the higher
    port, because a service has a low one.
    """
    values = _flow(flow) | _owner(flow, process)
    if domain:
        values[f"{_far(flow)}.domain"] = domain
    source, target = (f"{values[f'{e}.address']}:{values[f'{e}.port']}" for e in _ENDS)
    name = values.get("process.name", values["packet_hunter.how"])
    return {
        "timeUnixNano": str(int(flow["last_ns"])),
        "observedTimeUnixNano": str(now_ns),
        "severityNumber": _INFO,
        "severityText": "INFO",
        "eventName": "network.flow",
        "body": {"stringValue": _sound(f"{name} {source} > {target}")},
        "attributes": _attributes(values),
    }


_ENDS = ("source", "destination")


def _is_source(flow: np.void) -> bool:
    if flow["opened"] and not flow["forwarded"]:
        return int(flow["opened"]) == 1
    return int(flow["lport"]) > int(flow["rport"])


def _far(flow: np.void) -> str:
    return _ENDS[1] if _is_source(flow) else _ENDS[0]


def _flow(flow: np.void) -> dict[str, Value]:
    family, proto = int(flow["family"]), int(flow["proto"])
    local, remote = (address_bytes(flow[name]) for name in ("laddr", "raddr"))
    near = (address_text(family, local), int(flow["lport"]), "out")
    far = (address_text(family, remote), int(flow["rport"]), "in")
    ends = (near, far) if _is_source(flow) else (far, near)
    found: dict[str, Value] = {
        "event.kind": "event",
        "event.category": ["network"],
        "event.type": ["connection"],
        "network.transport": PROTO_NAMES.get(proto, str(proto)),
        "network.type": "ipv4" if family == 2 else "ipv6",
        "network.community_id": community_id(family, proto, local, near[1], remote, far[1]),
        "packet_hunter.first_ns": int(flow["first_ns"]),
        "packet_hunter.how": HOW_NAMES[int(flow["how"])],
        "packet_hunter.netns": int(flow["netns"]),
        "packet_hunter.forwarded": bool(flow["forwarded"]),
    }
    if not flow["forwarded"]:
        found["network.direction"] = "egress" if _is_source(flow) else "ingress"
    for unit in ("bytes", "packets"):
        found[f"network.{unit}"] = int(flow[f"{unit}_out"]) + int(flow[f"{unit}_in"])
    for end, (address, port, way) in zip(_ENDS, ends, strict=True):
        found |= {f"{end}.address": address, f"{end}.ip": address, f"{end}.port": port}
        for unit in ("bytes", "packets"):
            found[f"{end}.{unit}"] = int(flow[f"{unit}_{way}"])
    return found


def _owner(flow: np.void, process: ToldProcess | None) -> dict[str, Value]:
    if not flow["tgid"]:
        return {}
    found: dict[str, Value] = {
        "process.pid": int(flow["tgid"]),
        "process.name": text(bytes(flow["comm"])),
        "user.id": str(int(flow["uid"])),
    }
    if process is None:
        return found
    _, _, short = process.container.partition(":")
    namespace, _, pod = process.pod.rpartition("/")
    known: dict[str, Value | None] = {
        "process.executable.path": process.exe,
        "process.executable.name": os.path.basename(process.exe),
        "process.command_line": process.cmdline,
        "process.parent_pid": process.ppid,
        "process.owner": process.user,
        "process.hash.sha256": process.sha256,
        "user.name": process.user,
        "container.id": short or process.container,
        "container.name": process.container_name,
        "container.image.name": process.image,
        "k8s.pod.name": pod,
        "k8s.namespace.name": namespace,
        "packet_hunter.unit": process.unit,
    }
    return found | {name: value for name, value in known.items() if value not in ("", None)}


def _attributes(values: Mapping[str, Value]) -> list[dict[str, Any]]:
    return [{"key": name, "value": _value(value)} for name, value in values.items()]


def _value(value: Value) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):  # 64 bits are text in the JSON form
        return {"intValue": str(value)}
    if isinstance(value, str):
        return {"stringValue": _sound(value)}
    return {"arrayValue": {"values": _values(value)}}


def _values(words: Iterable[str]) -> list[dict[str, Any]]:
    return [_value(word) for word in words]


def _sound(word: str) -> str:
    """UTF-8 cannot hold half of a surrogate pair, and a receiver would refuse the whole request."""
    return word if word.isascii() else word.encode("utf-8", "backslashreplace").decode()
