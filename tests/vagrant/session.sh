#!/bin/bash
# SPDX-License-Identifier: MIT
# What run.sh runs beside its own libvirtd: the commands of the README, as they are written there.
set -euo pipefail

scratch=$(mktemp -d)
export VAGRANT_DOTFILE_PATH=$scratch/vagrant
finish() {
	code=$?
	if [ "$code" != 0 ]; then
		echo "== failed ($code); the end of the guest's kernel log:"
		vagrant ssh -c "sudo dmesg | tail -n 40" </dev/null || true
	fi
	vagrant destroy --force >/dev/null 2>&1 || true
	rm -rf "$scratch"
	exit "$code"
}
trap finish EXIT

step() {
	local started=$SECONDS
	echo "== ${*@Q}"
	# Vagrant draws its progress by rewriting a line.
	"$@" </dev/null 2>&1 | sed --unbuffered 's/^.*\r//; s/^.*\x1b\[K//'
	echo "== took $((SECONDS - started)) s"
}

step vagrant up
if vagrant ssh -c false </dev/null; then
	echo "== vagrant ssh hides failures" >&2
	exit 1
fi
step vagrant ssh -c "make test"
step vagrant ssh -c "./build.sh && sudo insmod kmod/sniffer.ko"
step vagrant ssh -c "tests/vagrant/capture.sh"
step vagrant ssh -c "sudo rmmod sniffer"
# `make` on the machine `test`. The same tests as above: once more those of the module is enough.
vagrant ssh -c "echo export TIERS=vm | sudo tee /etc/profile.d/zz-tiers.sh" </dev/null
step vagrant ssh -c make test | tee "$scratch/unquoted"
grep -q '^vm  *[1-9][0-9]* passed, 0 failed' "$scratch/unquoted"
# Ends after 30 s, having unloaded the module again.
step vagrant ssh -c "make run ENGINE=module && ! lsmod | grep sniffer"
echo "== all of it took $SECONDS s"
