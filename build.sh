#!/bin/sh
# SPDX-License-Identifier: MIT
# Sets up what packet-hunter needs: system packages, .venv, the Python extension, kmod/sniffer.ko.
#
#   ./build.sh                everything; fails when the module cannot be built
#   ./build.sh --try-module   goes on without the module when it cannot be built, and says why
#   ./build.sh --no-module    without the kernel module (engine `packet` needs none)
#   ./build.sh --test-tools   --try-module, and what the tests need
#   ./build.sh --browser      that and chromium, for make test-browser
#   ./build.sh --fuzz         that and what make fuzz needs
#   ./build.sh clean          removes what was built, .venv too (made again in a minute)
#   ./build.sh distclean      that, and what tests keep in ~/.cache/packet-hunter (up to some GB)
set -eu
cd "$(dirname "$0")"

say() { printf 'build: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

module=required
tools=no
browser=no
fuzz=no
case "${1-}" in
'') ;;
--try-module) module=wanted ;;
--no-module) module=no ;;
--test-tools) module=wanted tools=yes ;;
--browser) module=wanted tools=yes browser=yes ;;
--fuzz) module=wanted tools=yes fuzz=yes ;;
-h | --help)
	sed -n '3,/^set/s/^# \{0,1\}//p' "$0"
	exit 0
	;;
clean | distclean)
	cache=${PACKET_HUNTER_CACHE:-${XDG_CACHE_HOME:-${HOME-/root}/.cache}/packet-hunter}
	[ ! -e kmod/Makefile ] || make -s -C kmod clean
	rm -rf build dist python/*.egg-info python/nlproto/_*.so python/nlproto/_wire.c python/nlproto/_host.c python/nlproto/engines/*.o
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
	if [ "$1" = distclean ]; then
		for part in kernels modules packages vagrant; do rm -rf "${cache:?}/$part"; done
		rmdir "$cache" 2>/dev/null || true
	elif [ -d "$cache" ]; then
		say "kept $cache ($(du -sh "$cache" 2>/dev/null | cut -f1)), where tests keep kernels; make distclean removes it"
	fi
	exit 0
	;;
*)
	say "unknown word '$1'; ./build.sh [--try-module | --no-module | --test-tools | --browser | --fuzz | clean | distclean | --help]"
	exit 2
	;;
esac

check_python() {
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
		die "needs Python 3.11 or newer (Debian 12, Ubuntu 24.04), this is $(python3 -V)"
}

# --- system packages
command -v python3 >/dev/null 2>&1 && check_python
headers=linux-headers-$(uname -r)
missing=
want() { # COMMAND PACKAGE
	command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
PATH=$PATH:/usr/sbin:/sbin
want python3 python3
want gcc gcc
want make make
# engine ebpf's: installed or named with the others; where they alone are missing, root installs
# them and who is not root is told and goes on
bpf=
if [ ! -e python/nlproto/engines/hunter.bpf.o ] || [ "$tools" = yes ]; then
	command -v clang >/dev/null 2>&1 || bpf="$bpf clang"
	command -v llvm-strip >/dev/null 2>&1 || bpf="$bpf llvm"
	[ -e /usr/include/bpf/bpf_helpers.h ] || bpf="$bpf libbpf-dev"
fi
ldconfig -p 2>/dev/null | grep -q 'libbpf\.so\.1' || bpf="$bpf libbpf1"
if command -v python3 >/dev/null 2>&1; then
	python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
	header=$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')
	[ -e "$header/Python.h" ] || missing="$missing python3-dev"
else
	missing="$missing python3-venv python3-dev"
fi
[ -e /usr/include/linux/types.h ] || missing="$missing libc6-dev"
if [ "$module" != no ] && [ -e /proc/modules ] && [ ! -e "/lib/modules/$(uname -r)/build" ]; then
	# A fresh machine has no package lists yet; a kernel of one's own has no package.
	if [ "$(id -u)" = 0 ] && [ -z "$(find /var/lib/apt/lists -name '*_Packages*' -print -quit 2>/dev/null)" ]; then
		apt-get update -q >/dev/null 2>&1 || true
	fi
	if apt-cache show "$headers" >/dev/null 2>&1; then missing="$missing $headers"; fi
fi
if [ "$tools" = yes ]; then
	want git git
	want ip iproute2
	want nft nftables
	want iptables iptables
	want ping iputils-ping
	want shellcheck shellcheck
	want tcpdump tcpdump
	want tshark tshark
	want ps procps
	want zstd zstd
	want lz4 lz4
	want xz xz-utils
	want bzip2 bzip2
	want insmod kmod
	# in a virtual machine the module is tested on that machine's own kernel
	if [ "${PACKET_HUNTER_KERNEL-}" != own ]; then
		want mmdebstrap mmdebstrap
		[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing="$missing debian-archive-keyring"
		want qemu-system-x86_64 qemu-system-x86
		want udevadm udev
		want busybox busybox-static
		want file file # virtme-ng asks it whether busybox is static
	fi
fi
if [ "$browser" = yes ] && ! command -v chromium-browser >/dev/null 2>&1; then
	want chromium chromium
fi
if [ "$fuzz" = yes ] && [ ! -e "$(clang -print-file-name=libclang_rt.fuzzer-x86_64.a 2>/dev/null)" ]; then
	missing="$missing libclang-rt-dev"
fi
if [ -n "$missing" ] || { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; }; then missing="$missing$bpf"; fi
if [ -n "$missing" ]; then
	command -v apt-get >/dev/null 2>&1 || die "needs$missing; install them with this system's package manager"
	install="apt-get install -y --no-install-recommends$missing"
	if [ "$(id -u)" != 0 ]; then
		if command -v sudo >/dev/null 2>&1; then
			die "packages are missing; run: sudo apt-get update && sudo $install"
		fi
		die "packages are missing; run: su - -c 'apt-get update && $install'"
	fi
	say "installing$missing"
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -q >/dev/null 2>&1 || true
	$install -q >/dev/null || { say "the mirror failed; once more"; apt-get update -q && $install -q >/dev/null; } ||
		die "could not install$missing; see apt-get's words above"
	check_python
fi

# --- Python, in a virtual environment of its own
[ -x .venv/bin/python ] || { say "making .venv"; python3 -m venv .venv; }
extra=all
[ "$tools" = no ] || extra=dev
[ "$fuzz" = no ] || extra=fuzz
stamp=.venv/built-$extra
if [ ! -e "$stamp" ] || [ -n "$(find pyproject.toml setup.py shared_proto.h VERSION python/build_*.py python/nlproto/native/*.[ch] -newer "$stamp")" ] ||
	! .venv/bin/python -c 'import nlproto.records.wire' 2>/dev/null; then
	say "installing Python packages into .venv (a minute or two the first time)"
	.venv/bin/pip install -q --disable-pip-version-check -e ".[$extra]" ||
		{ say "pip failed; once more"; .venv/bin/pip install -q --disable-pip-version-check -e ".[$extra]"; } ||
		die "pip could not install; see its words above"
	touch "$stamp"
fi
# an editable installation leaves it out; see python/nlproto/guard.py
cp python/packet-hunter.pth .venv/lib/python3*/site-packages/

# --- the programs of engine ebpf
if ! command -v clang >/dev/null 2>&1; then
	[ -e python/nlproto/engines/hunter.bpf.o ] || say "going on without engine ebpf; for it install$bpf and run this again"
elif ! make -s -C bpf; then
	say "engine ebpf not built: see clang's words above (going on without it)"
fi

# --- a real Prometheus server for the tests: unpacked, not installed, so that no service begins
if [ "$tools" = yes ] && [ ! -x .venv/prometheus/usr/bin/prometheus ]; then
	deb=$(mktemp -d)
	fetch() { (cd "$deb" && apt-get download -q prometheus >/dev/null 2>&1); }
	if fetch || { [ "$(id -u)" = 0 ] && apt-get update -q >/dev/null 2>&1 && fetch; }; then
		dpkg-deb -x "$deb"/prometheus_*.deb .venv/prometheus
	else
		say "could not download the package prometheus: the test of the metrics will be skipped"
	fi
	rm -rf "$deb"
fi

# --- the module
[ "$module" = no ] && exit 0
if [ ! -e "/lib/modules/$(uname -r)/build" ]; then
	reason="the running kernel's headers are missing, and apt-get knows no $headers"
	[ -e /proc/modules ] || reason="this kernel takes no modules (no /proc/modules)"
	[ "$module" = wanted ] || die "kmod/sniffer.ko not built: $reason; or ./build.sh --no-module for the other engines"
	say "kmod/sniffer.ko not built: $reason (going on without)"
	exit 0
fi
if make -s -C kmod; then
	say "built kmod/sniffer.ko for $(uname -r)"
elif [ "$module" = required ]; then
	die "kmod/sniffer.ko not built: see the compiler's words above; or ./build.sh --no-module for the other engines"
else
	say "kmod/sniffer.ko not built: see the compiler's words above (going on without)"
fi
