# SPDX-License-Identifier: MIT
"""The page's live part: the same rates as in `top`, as JSON."""

from __future__ import annotations

import json
import threading
from typing import Any

from hunter.show.names import nat
from hunter.show.rates import FlowRate, ProcessRate, TrafficMeter
from hunter.top.state import State

__all__ = ["LiveRates"]

_FLOWS = 500
"""The most flows of one process in an answer: those with the highest rate."""


class LiveRates:
    """Rates that one thread updates each second, and others read."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._lock = threading.Lock()
        """Held while `state` is updated and while it is read."""

    def tick(self) -> None:
        """Take what came since the last call. Raises Error if nothing more comes."""
        with self._lock:
            self.state.take()
        if self.state.failure is not None:
            raise self.state.failure

    def processes(self) -> bytes:
        """Return all processes as JSON: rates in bytes a second, totals in bytes."""
        with self._lock:
            rows = [self._process(one) for one in self.state.rates]
            account = self.state.account_text()
        return json.dumps({"account": account, "processes": rows}).encode()

    def flows(self, pid: int, start_ns: int) -> bytes:
        """Return the flows of one process as JSON, the fastest first."""
        with self._lock:
            found = [one for one in self.state.rates if one.key[:2] == (pid, start_ns)]
            flows = [flow for one in found for flow in one.flows.values()]
            flows.sort(key=lambda flow: (-flow.meter.rate, -flow.meter.total))
            rows = [_flow(flow) | self.state.going([flow])._asdict() for flow in flows[:_FLOWS]]
        return json.dumps({"flows": rows, "total": len(flows)}).encode()

    def _process(self, one: ProcessRate) -> dict[str, Any]:
        details = self.state.source.get(*one.key[:2]) if one.pid else None
        return {
            "pid": one.pid,
            "start_ns": str(one.key[1]),  # more digits than a number of JavaScript holds
            "comm": one.comm,
            "user": "" if one.uid is None else self.state.known.user(one.uid),
            "exe": details.exe if details else "",
            "place": (details.container or details.unit) if details else "",
            "ended": self.state.ended(one),
            "flows": len(one.flows),
            **self.state.going(one.flows.values())._asdict(),
            "failed": one.failed,
            "resets": one.resets,
            **_rates(one.meter),
        }


def _rates(meter: TrafficMeter) -> dict[str, float]:
    return {
        "sent": round(meter.sent_rate),
        "received": round(meter.received_rate),
        "total": meter.total,
        "packets": meter.packets,
    }


def _flow(flow: FlowRate) -> dict[str, Any]:
    return {
        "netns": flow.netns,
        "proto": flow.proto,
        "local": flow.local,
        "lport": flow.lport,
        "remote": flow.remote,
        "rport": flow.rport,
        "nat": nat(*flow.translated()),
        **_rates(flow.meter),
    }
