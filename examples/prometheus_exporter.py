#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Bytes a program for Prometheus: prometheus_exporter.py [--socket PATH] [--port 9777]"""

import argparse

from prometheus_client import Counter, start_http_server

from nlproto.client.client import DaemonClient, StreamBatch
from nlproto.client.frames import DEFAULT_SOCKET
from nlproto.records.wire import lib, text

MOST = 1000
"""Programs with a counter of their own: any user can run programs of any name."""

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--socket", default=DEFAULT_SOCKET)
parser.add_argument("--port", type=int, default=9777)
options = parser.parse_args()

sent = Counter("program_sent_bytes", "Bytes of IP packets", ["program"])
received = Counter("program_received_bytes", "Bytes of IP packets", ["program"])
names: set[str] = set()
start_http_server(options.port, "127.0.0.1")

with DaemonClient(options.socket) as client:
    for event in client.subscribe():
        if isinstance(event, StreamBatch):
            for record in event.batch.records:
                way = received if record["dir"] == lib.SNIFFER_DIR_IN else sent
                name = text(bytes(record["comm"])) or "unknown"
                if len(names) < MOST:
                    names.add(name)
                way.labels(name if name in names else "other").inc(float(record["len"]))
