#!/bin/sh
# SPDX-License-Identifier: MIT
# make run: live traffic with owners. It loads the module only when asked to (ENGINE=module).
set -eu
engine=$1
case $engine in
module) ./build.sh ;;
packet) ./build.sh --no-module ;;
*) ./build.sh --try-module ;;
esac

as_root=
if [ "$(id -u)" != 0 ]; then
	as_root=sudo
	command -v sudo >/dev/null 2>&1 ||
		{ echo "make run: capturing needs root, and sudo is missing; run make run as root" >&2; exit 1; }
fi
# With a trap Ctrl-C ends the hunter, and this script afterwards, in its own way.
trap : INT TERM
traffic=
loaded=
finish() {
	[ -z "$traffic" ] || kill "$traffic" 2>/dev/null || true
	[ -z "$loaded" ] || $as_root rmmod sniffer
}
trap finish EXIT

if [ -d /sys/module/sniffer ]; then
	echo "make run: the module is loaded" >&2
elif [ "$engine" = module ]; then
	$as_root insmod kmod/sniffer.ko
	loaded=yes
fi
set -- $as_root .venv/bin/python -m hunter --engine "$engine"
if [ ! -t 1 ]; then
	echo "make run: no terminal, so 30 s with traffic of my own on loopback" >&2
	.venv/bin/python tests/loopback_traffic.py 33 &
	traffic=$!
	set -- "$@" --duration 30
fi
"$@"
