#!/bin/bash
# SPDX-License-Identifier: MIT
# Runs as root in the guest at its first `vagrant up`: packages, and a login that can just type
# make, and sudo python.
set -euo pipefail

tree=/vagrant
export DEBIAN_FRONTEND=noninteractive

mapfile -t wanted < <(sed '/^#/d' "$tree/vagrant/packages")
missing=()
for package in "${wanted[@]}"; do
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
		missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
	apt-get update -q
	apt-get install -q -y --no-install-recommends "${missing[@]}"
fi

# A wheelhouse that the host handed over: then the guest needs no network. Under emulation compiling
# every file of every package takes minutes, and a test needs few of them.
if [ -d /srv/wheels ]; then
	cat >/etc/pip.conf <<-'EOF'
		[global]
		no-index = true
		find-links = /srv/wheels
		disable-pip-version-check = true
		[install]
		no-compile = true
	EOF
fi

cat >/etc/profile.d/packet-hunter.sh <<EOF
# The tests may load the module here: this machine is for that.
export PACKET_HUNTER_KERNEL=own
PATH=$tree/.venv/bin:\$PATH
if [ "\$PWD" = "\$HOME" ]; then cd $tree; fi
EOF

if [ -n "${TIERS-}" ]; then echo "export TIERS='$TIERS'" >>/etc/profile.d/packet-hunter.sh; fi

cat >/etc/sudoers.d/packet-hunter <<EOF
Defaults:vagrant secure_path="$tree/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
Defaults:vagrant env_keep += "PACKET_HUNTER_KERNEL"
EOF
chmod 440 /etc/sudoers.d/packet-hunter
visudo -cq
