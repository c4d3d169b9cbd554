#!/bin/bash
# SPDX-License-Identifier: MIT
# Runs a command beside a libvirtd of its own: tests/vagrant/isolated.sh COMMAND [ARGUMENT]...
#
#   this machine    its libvirtd, networks and /var/lib/libvirt: neither needed nor touched
#     └─ namespaces (network, mounts, processes)
#          virtlogd, libvirtd, dnsmasq, 192.168.121.0/24 without a route out
#          COMMAND, and the guests it starts
#
# When COMMAND ends, all of that ends with it. Needs root.
set -euo pipefail

if [ "${1:-}" != --inside ]; then
	[ "$(id -u)" = 0 ] || { echo "isolated.sh: needs root (network and mount namespaces)" >&2; exit 1; }
	scratch=$(mktemp -d "${TMPDIR:-/tmp}/packet-hunter-libvirt.XXXXXX")
	trap 'rm -rf "$scratch"' EXIT
	unshare --net --mount --pid --fork --kill-child --mount-proc --propagation private -- \
		"$0" --inside "$scratch" "$@" </dev/null &
	# unshare ignores TERM; what it started dies with it.
	trap 'kill -KILL $!' INT TERM
	code=0
	wait $! || code=$?
	exit "$code"
fi
scratch=$2
shift 2

# The sysfs of this network namespace: libvirt reads its devices there.
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null || true
for directory in /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /run/libvirt; do
	mkdir -p "$directory" "$scratch$directory"
	case $directory in /etc/*) cp -a "$directory/." "$scratch$directory" ;; esac
	mount --bind "$scratch$directory" "$directory"
done
rm -rf /etc/libvirt/qemu/autostart/* /etc/libvirt/qemu/networks/autostart/*
ip link set lo up

cat >/etc/libvirt/libvirtd.conf <<'CONF'
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_group = "root"
CONF
cat >/etc/libvirt/qemu.conf <<'CONF'
security_driver = "none"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
namespaces = []
cgroup_controllers = []
CONF

# They end with this process namespace.
virtlogd --pid-file "$scratch/virtlogd.pid" >"$scratch/virtlogd.log" 2>&1 &
libvirtd --pid-file "$scratch/libvirtd.pid" >"$scratch/libvirtd.log" 2>&1 &
for _ in $(seq 300); do
	if virsh --connect qemu:///system version >/dev/null 2>&1; then
		code=0
		"$@" || code=$?
		exit "$code"
	fi
	sleep 0.1
done
echo "isolated.sh: libvirtd did not answer within 30 s:" >&2
tail -n 20 "$scratch/libvirtd.log" >&2
exit 1
