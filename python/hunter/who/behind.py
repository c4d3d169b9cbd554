# SPDX-License-Identifier: MIT
"""Finds who is behind a proxy that a container's runtime put in front of a published port.

Such a proxy has two connections: one at the port, and one to the container. The process at the far
end of the second is shown with the first.
"""

from __future__ import annotations

from typing import Any

from nlproto.client.client import DaemonClient

__all__ = ["add_behind"]

_PROXIES = frozenset(("docker-proxy", "rootlesskit", "rootlessport"))
_OWN, _EACH = 200, 20  # the most flows of a proxy, and of each of its connections


def add_behind(client: DaemonClient, answer: dict[str, Any]) -> None:
    """Add the flows behind proxies to op "who"'s reply; `behind` of each says whose."""
    flows = answer["flows"]
    proxies = {
        (one["pid"], one["start_ns"]): one["comm"] for one in flows if one["comm"] in _PROXIES
    }
    known = {_key(one) for one in flows}
    known_processes = {(one["tgid"], one["start_ns"]) for one in answer["processes"]}
    for (pid, start_ns), comm in proxies.items():
        own = client.who(pid=pid, limit=_OWN)["flows"]
        out = [one for one in own if one["start_ns"] == start_ns and _key(one) not in known]
        questions = [("history", _question(one)) for one in out]
        for reply in client.pipeline(questions):
            for one in reply["flows"]:
                if one["pid"] in (None, pid) or _key(one) in known:
                    continue
                known.add(_key(one))
                flows.append({**one, "behind": {"pid": pid, "comm": comm}})
            for process in reply["processes"]:
                key = process["tgid"], process["start_ns"]
                if key not in known_processes and key[0] != pid:
                    known_processes.add(key)
                    answer["processes"].append(process)


def _question(flow: dict[str, Any]) -> dict[str, Any]:
    ends = [[flow["local"], flow["lport"]], [flow["remote"], flow["rport"]]]
    return {"proto": flow["proto"], "ends": ends, "limit": _EACH}


def _key(flow: dict[str, Any]) -> tuple[Any, ...]:
    names = ("netns", "proto", "local", "lport", "remote", "rport", "pid", "start_ns", "cookie")
    return tuple(flow[name] for name in names)
