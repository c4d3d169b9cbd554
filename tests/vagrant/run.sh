#!/bin/bash
# SPDX-License-Identifier: MIT
# make test-vagrant: the commands of the README in a Vagrant machine, without Vagrant's cloud.
#
# Real vagrant and libvirt, in namespaces; a guest without a route out; emulation unless
# PACKET_HUNTER_DRIVER=kvm. Box and wheels are kept in the cache and made anew when what they are
# made from changes. Needs root.
set -euo pipefail
cd "$(dirname -- "$0")/../.."

[ "$(id -u)" = 0 ] || { echo "test-vagrant: needs root; run: sudo make test-vagrant" >&2; exit 1; }
packages=(vagrant vagrant-libvirt libvirt-daemon-system libvirt-clients qemu-system-x86 qemu-utils
	dnsmasq-base iptables nftables rsync openssh-client mmdebstrap extlinux e2fsprogs python3-venv)
missing=()
for package in "${packages[@]}"; do
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
		missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
	echo "test-vagrant: installing ${missing[*]}"
	# Their libvirtd is not wanted on this machine: no service is started by what is installed here.
	policy=/usr/sbin/policy-rc.d ours=
	if [ ! -e "$policy" ]; then
		ours=$policy
		trap 'rm -f "$ours"' EXIT
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 755 "$policy"
	fi
	apt-get update -q >/dev/null
	DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}" >/dev/null
	trap - EXIT
	rm -f ${ours:+"$ours"}
fi

cache=${PACKET_HUNTER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/packet-hunter}/vagrant
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9

recipe=$(cat vagrant/box.sh vagrant/packages | sha256sum | cut -c1-16)
box=$cache/$recipe.box
if [ ! -e "$box" ]; then
	rm -rf "$cache"/*.box "${cache:?}/home"
	started=$SECONDS
	vagrant/box.sh "$box"
	echo "test-vagrant: built the box in $((SECONDS - started)) s"
fi

# For the guest's Python: the box is Debian 12 on amd64.
requirements=$(python3 tests/vagrant/wheels.py pyproject.toml)
wheels=$cache/wheels-$(sha256sum <<<"$requirements" | cut -c1-16)
if [ ! -d "$wheels" ]; then
	rm -rf "$cache"/wheels-*
	started=$SECONDS
	scratch=$(mktemp -d "$cache/download.XXXXXX")
	trap 'rm -rf "$scratch"' EXIT
	python3 -m venv "$scratch/venv"
	pip=$scratch/venv/bin/pip
	# What exists as source only becomes a wheel here; what is not for every Python is fetched anew.
	"$pip" wheel --quiet --no-deps --wheel-dir "$scratch/wheels" -r /dev/stdin <<<"$requirements"
	find "$scratch/wheels" -name '*.whl' -not -name '*-none-any.whl' -delete
	"$pip" download --quiet --dest "$scratch/wheels" --find-links "$scratch/wheels" \
		--only-binary=:all: --python-version 3.11 --platform manylinux_2_17_x86_64 \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_34_x86_64 \
		-r /dev/stdin <<<"$requirements"
	mv "$scratch/wheels" "$wheels"
	echo "test-vagrant: downloaded the wheels in $((SECONDS - started)) s"
fi

export PACKET_HUNTER_BOX=packet-hunter-$recipe PACKET_HUNTER_BOX_URL=file://$box
export PACKET_HUNTER_WHEELS=$wheels PACKET_HUNTER_DRIVER=${PACKET_HUNTER_DRIVER:-qemu}
export VAGRANT_HOME=$cache/home VAGRANT_DEFAULT_PROVIDER=libvirt
timeout --kill-after=30 5400 tests/vagrant/isolated.sh tests/vagrant/session.sh
