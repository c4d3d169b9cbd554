#!/bin/bash
# SPDX-License-Identifier: MIT
# Runs in the guest, module loaded: daemon and hunter as in the README, known traffic, and a look
# at what was captured.
set -euo pipefail
# Each job has a process group of its own: sudo passes no signal on that comes from its own group.
set -m

lsmod | grep -q '^sniffer ' || { echo "capture.sh: the module is not loaded" >&2; exit 1; }
rm -f capture.csv

wait_for() {
	local what=$1
	shift
	for _ in $(seq 600); do
		if "$@"; then return; fi
		sleep 0.2
	done
	echo "capture.sh: $what: not within 120 s" >&2
	exit 1
}
finish() {
	for job in $(jobs -pr); do sudo kill -TERM "$job"; done
}
trap finish EXIT

knock() {
	echo >/dev/udp/127.0.0.1/9
	grep -qs ',9,' capture.csv
}

sudo python -m daemon &
daemon=$!
wait_for "the daemon's socket" test -S /run/packet-hunter/daemon.sock
# shellcheck disable=SC2024 # The log is ours, not root's.
sudo python -m hunter --save capture.csv >hunter.log 2>&1 &
hunter=$!
wait_for "the first rows in capture.csv" knock

python tests/vagrant/traffic.py >truth.json
sleep 1
sudo kill -INT "$hunter"
wait "$hunter"
tail -n 12 hunter.log
sudo kill -TERM "$daemon"
wait "$daemon"

python tests/vagrant/check_capture.py capture.csv truth.json
