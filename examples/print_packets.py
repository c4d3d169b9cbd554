#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Prints each packet with its owner: print_packets.py [--socket PATH] [FILTER ...]

The daemon has to run. Root sees all packets, others those of their own processes.
"""

import argparse

from hunter.show.text import plain
from nlproto.client.client import DaemonClient, StreamBatch
from nlproto.client.frames import DEFAULT_SOCKET
from nlproto.filters.parse import parse
from nlproto.records.wire import packet

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--socket", default=DEFAULT_SOCKET)
parser.add_argument("filter", nargs="*", help="as in: tcp port 443")
options = parser.parse_args()

with DaemonClient(options.socket) as client:
    # the daemon takes numbers only: parse() resolves names of hosts and services here
    for event in client.subscribe(str(parse(" ".join(options.filter)))):
        if not isinstance(event, StreamBatch):
            continue
        for record in event.batch.records:
            one = packet(record, event.batch.clock)
            # a process chooses its name, maybe with a terminal's control characters
            owner = f"{plain(one.comm)}.{one.pid}" if one.pid is not None else f"({one.how})"
            print(
                f"{one.time:%H:%M:%S.%f} {owner} {one.proto}"
                f" {one.src}.{one.sport} > {one.dst}.{one.dport} len {one.len}",
                flush=True,
            )
