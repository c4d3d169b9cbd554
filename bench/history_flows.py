# SPDX-License-Identifier: MIT
"""Flows of a busy server: what it serves, what it asks of others, DNS, short programs."""

from __future__ import annotations

import numpy as np

from nlproto.tables.flows import FLOW
from nlproto.tables.processes import Process

__all__ = ["HOUR_NS", "flows_of_hour", "processes_of"]

HOUR_NS = 3600 * 10**9
_SHARES = (0.45, 0.30, 0.15, 0.10)
"""Served connections, connections to databases and caches, DNS, programs that run once."""


def flows_of_hour(count: int, begin_ns: int, seed: int) -> np.ndarray:
    """Return so many FLOWs whose packets lie in the hour from `begin_ns` (Unix time) on."""
    random = np.random.default_rng(seed)
    flows = np.zeros(count, FLOW)
    kind = random.choice(4, count, p=_SHARES)
    served, inner, dns, once = (np.flatnonzero(kind == n) for n in range(4))
    begins = np.sort(random.integers(0, HOUR_NS, count)).astype(np.uint64)
    lasts = random.lognormal(np.log(0.2), 2.0, count).clip(0, 300)
    flows["first_ns"] = np.uint64(begin_ns) + begins
    flows["last_ns"] = flows["first_ns"] + (lasts * 1e9).astype(np.uint64)
    flows["cookie"] = seed * 10**7 + np.arange(count) * 2 + random.integers(0, 2, count)
    flows["inode"] = flows["cookie"] * np.uint64(3) + random.integers(0, 50, count).astype(
        np.uint64
    )
    flows["family"], flows["proto"], flows["how"] = 2, 6, 3
    flows["netns"] = random.choice([4026531840, 4026532500, 4026532601], count, p=[0.7, 0.2, 0.1])
    clients = random.integers(1 << 24, 0xDFFFFFFF, 20_000, dtype=np.uint32)
    servers = np.uint32(0x0A000000) + random.integers(1, 1 << 16, 40, dtype=np.uint32)

    def addresses(name: str, rows: np.ndarray, values: np.ndarray) -> None:
        raw = np.zeros((len(rows), 16), np.uint8)
        raw[:, :4] = values.astype(">u4").view(np.uint8).reshape(-1, 4)
        flows[name][rows] = raw.view(np.uint64)

    everybody = np.arange(count)
    addresses("laddr", everybody, np.full(count, 0x0A000001, np.uint32))
    ephemeral = random.integers(32768, 61000, count)
    flows["lport"], flows["rport"] = ephemeral, 53
    popular = np.minimum(random.zipf(1.2, len(served)), len(clients)) - 1
    addresses("raddr", served, clients[popular])
    flows["lport"][served], flows["rport"][served] = 443, ephemeral[served]
    addresses("raddr", inner, servers[random.integers(0, 40, len(inner))])
    flows["rport"][inner] = random.choice([5432, 6379, 9092, 8080, 4317], len(inner))
    addresses("raddr", dns, np.full(len(dns), 0x0A000002, np.uint32))
    flows["proto"][dns] = 17
    addresses("raddr", once, clients[random.integers(0, len(clients), len(once))])
    flows["rport"][once] = 443
    for rows, names, pids in (
        (served, [b"nginx"], 8),
        (inner, [b"gunicorn", b"java", b"celery"], 60),
        (dns, [b"systemd-resolve", b"java"], 3),
    ):
        pid = random.integers(0, pids, len(rows))
        flows["tgid"][rows] = 1000 + pid * 17
        flows["start_ns"][rows] = 10**10 + pid.astype(np.uint64) * np.uint64(123_456_789)
        flows["comm"][rows] = np.array(names)[pid % len(names)]
        flows["uid"][rows] = 33 + pid % 3
    flows["tgid"][once] = 100_000 + np.arange(len(once)) // 3
    flows["start_ns"][once] = begins[once]
    flows["comm"][once] = random.choice([b"curl", b"git", b"apt", b"python3", b"ssh"], len(once))
    flows["uid"][once] = random.choice([0, 1000, 1001], len(once))
    sizes = random.lognormal(np.log(4000), 1.5, (2, count)).astype(np.uint64)
    flows["bytes_in"], flows["bytes_out"] = sizes
    flows["packets_in"], flows["packets_out"] = sizes // np.uint64(700) + np.uint64(3)
    return flows


def processes_of(flows: np.ndarray) -> list[Process]:
    """Return the owners of `flows`, with what /proc says of each."""
    _, first = np.unique(flows[["tgid", "start_ns"]], return_index=True)
    found = []
    for flow in flows[first]:
        pid, name, uid = int(flow["tgid"]), flow["comm"].decode(), int(flow["uid"])
        unit = f"{name}.service" if uid < 1000 else f"session-{pid % 50}.scope"
        found.append(
            Process(
                pid,
                int(flow["start_ns"]),
                comm=name,
                ppid=1,
                uid=uid,
                user=f"user{uid}",
                exe=f"/usr/bin/{name}",
                cmdline=f"/usr/bin/{name}",
                cgroup=f"/system.slice/{unit}",
                unit=unit,
            )
        )
    return found
