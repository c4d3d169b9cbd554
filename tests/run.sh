#!/bin/sh
# SPDX-License-Identifier: MIT
# make run: live traffic with owners. It loads the module only when asked to (ENGINE=module).
set -eu
engine=$1
if [ "$engine" = module ]; then ./build.sh; else ./build.sh --no-module; fi

as_root=
[ "$(id -u)" = 0 ] || as_root=sudo
if [ -d /sys/module/sniffer ]; then
	echo "make run: the module is loaded" >&2
elif [ "$engine" = module ]; then
	$as_root insmod kmod/sniffer.ko
	trap '$as_root rmmod sniffer' EXIT
elif [ -e kmod/sniffer.ko ]; then
	echo "make run: engine packet (short-lived sockets stay unnamed); exact with: sudo insmod kmod/sniffer.ko" >&2
else
	echo "make run: engine packet (short-lived sockets stay unnamed); exact with: ./build.sh && sudo insmod kmod/sniffer.ko" >&2
fi
if [ -t 1 ]; then
	$as_root .venv/bin/python -m hunter --engine "$engine" || exit
else
	echo "make run: no terminal, so 30 s with traffic of my own on loopback" >&2
	.venv/bin/python tests/loopback_traffic.py 33 &
	traffic=$!
	status=0
	$as_root .venv/bin/python -m hunter --engine "$engine" --duration 30 || status=$?
	kill "$traffic" 2>/dev/null || true
	exit "$status"
fi
