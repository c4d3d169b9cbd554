#!/bin/sh
# SPDX-License-Identifier: MIT
# In the guest: plays each workload ROUNDS times in each configuration and prints
# "CONFIGURATION WORKLOAD NANOSECONDS" lines. kernel_guest.sh DIRECTORY ROUNDS CONFIGURATION...
# DIRECTORY has sniffer.ko, unicast.ko, workload, reader and ring_reader. The module is loaded before
# the first configuration that wants it; those of others come before. PYTHON has what nlproto imports.
set -eu
directory=$1 rounds=$2 tree=$PWD
shift 2
ip link set lo up
# shellcheck disable=SC3045 # every shell of the guest has it
ulimit -n 20100 # 10,000 descriptors and room

# A build small enough for an emulator: twelve files, two at a time, from memory to memory.
mkdir -p /tmp/build
cd /tmp/build
for number in 1 2 3 4 5 6 7 8 9 10 11 12; do
	printf '#include <stdio.h>\nint f%s(int n) { return printf("%%d", n); }\n' "$number" >"$number.c"
done
# shellcheck disable=SC2016 # make's own variable
printf 'OBJECTS = 1.o 2.o 3.o 4.o 5.o 6.o 7.o 8.o 9.o 10.o 11.o 12.o\nall: $(OBJECTS)\n' >Makefile

play() {
	for what in 'udp 2000' 'tcp 300' 'rr 1000' 'socket 1000' 'close 2000' 'fork 50' 'fork-files 3' \
		'fork-sockets 3' 'command 1 make -s -B -j2'; do
		name=${what%% *}
		[ "$name" != command ] || name="make"
		# shellcheck disable=SC2086 # words are wanted
		echo "$1 $name $("$directory/workload" $what)"
	done
}

# Starts a program that runs beside the workloads; then waits until it has said something.
beside() {
	: >"$directory/said"
	"$@" >"$directory/said" 2>&1 &
	beside=$!
}
await() {
	while ! grep -q "$1" "$directory/said"; do
		kill -0 "$beside" || { cat "$directory/said" >&2; exit 1; }
		sleep 0.1
	done
}

play warm >/dev/null
for configuration; do
	beside=
	case $configuration in
	unloaded | tcpdump | nethogs | ebpf) ;;
	unicast) insmod "$directory/unicast.ko" ;;
	*) [ -e /sys/module/sniffer ] || insmod "$directory/sniffer.ko" ;;
	esac
	case $configuration in
	reader | flows | unicast)
		group=packets
		[ "$configuration" = reader ] || group=$configuration
		beside "$directory/reader" "$group"
		await joined
		;;
	tcpdump)
		beside tcpdump -i lo -w /dev/null
		await 'listening on'
		;;
	ebpf)
		beside env PYTHONPATH="$tree/python" "$PYTHON" "$tree/bench/ebpf_reader.py" \
			"$directory/ring_reader"
		await joined
		;;
	nethogs)
		beside nethogs -t -a -d 1
		await Refreshing
		;;
	esac
	round=0
	while [ $round -lt "$rounds" ]; do
		play "$configuration"
		round=$((round + 1))
	done
	if [ -n "$beside" ]; then
		kill "$beside"
		wait "$beside" || true # it ends by the signal
	fi
	[ "$configuration" != unicast ] || rmmod unicast
done
