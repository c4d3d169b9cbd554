#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Prints who has, and who had, a port: who_had_port.py [--socket PATH] PORT"""

import argparse
from datetime import datetime

from hunter.show.text import plain
from nlproto.client.client import DaemonClient
from nlproto.client.frames import DEFAULT_SOCKET

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--socket", default=DEFAULT_SOCKET)
parser.add_argument("port", type=int)
options = parser.parse_args()

with DaemonClient(options.socket) as client:
    found = client.who(port=options.port)
# plain(): a process chooses its name, maybe with a terminal's control characters
for owner in found["owners"]:  # sockets that are there now
    name = f"{plain(owner['comm'])}.{owner['pid']}"
    print(f"has  {owner['proto']} {owner['address']}.{owner['port']}  {name}")
for flow in found["flows"]:  # of the history, last seen first; "pid" is None where nobody is known
    seen = datetime.fromtimestamp(flow["last"])
    ends = f"{flow['local']}.{flow['lport']} - {flow['remote']}.{flow['rport']}"
    print(f"had  {flow['proto']} {ends}  {plain(flow['comm'])}.{flow['pid']}  until {seen:%F %T}")
if found["truncated"]:
    print("there is more: ask with since, until or limit")
