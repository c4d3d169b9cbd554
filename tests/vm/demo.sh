#!/bin/sh
# SPDX-License-Identifier: MIT
# In the guest of `make demo`: demo.sh MODULE. Module, daemon, hunter, real traffic.
set -eu
ip link set lo up
insmod "$1"
mkdir -p /run/packet-hunter
.venv/bin/python -m daemon >/tmp/daemon.log 2>&1 &
daemon=$!
tries=0
until [ -S /run/packet-hunter/daemon.sock ]; do
	tries=$((tries + 1))
	[ "$tries" -lt 120 ] || { cat /tmp/daemon.log; exit 1; }
	sleep 0.5
done
echo "# packet-hunter -n -- demo_traffic.py: a web server, short-lived clients, DNS-like datagrams"
.venv/bin/python -m hunter -n --print --summary -- .venv/bin/python tests/vm/demo_traffic.py
echo "# packet-hunter who --port 8053 --since 60s: its clients have exited"
.venv/bin/python -m hunter who --port 8053 --since 60s
kill -TERM "$daemon"
wait "$daemon"
rmmod sniffer
