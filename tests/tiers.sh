#!/bin/sh
# SPDX-License-Identifier: MIT
# make test [TIERS="..."]: one tier after the other, each goes on when another failed; then the
# summary, which names the tiers that were left out.
set -u
tiers=${1:-lint unit host vm attribution ebpf links}
export PYTHONUNBUFFERED=1
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
failed=0
# In a virtual machine that is there for the tests root is at hand; it leaves no files in the tree.
root=
if [ "${PACKET_HUNTER_KERNEL-}" = own ] && [ "$(id -u)" != 0 ]; then
	root="sudo env PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTEST_ADDOPTS=-pno:cacheprovider"
fi

tier() { # NAME PYTEST-ARGUMENTS
	name=$1
	shift
	echo "=== $name"
	as=$root
	[ "$name" != unit ] || as=
	[ "$name" != ebpf ] || as="${root:-env} PACKET_HUNTER_ENGINE=ebpf PACKET_HUNTER_SOME=1"
	# shellcheck disable=SC2086 # words are wanted
	$as .venv/bin/python -m pytest -v --junitxml="$results/$name.xml" -o junit_suite_name="$name" "$@" || failed=1
}

for name in $tiers; do
	case $name in
	lint)
		echo "=== lint"
		if sh tests/lint.sh; then
			echo passed >"$results/lint"
		else
			echo failed >"$results/lint"
			failed=1
		fi
		;;
	unit) tier unit tests/unit ;;
	host) tier host tests/host --reruns 1 -rR ;; # the machine has other work; the summary tells
	vm) tier vm tests/vm --ignore tests/vm/test_attribution.py --ignore tests/vm/proof ;;
	attribution | ebpf) tier "$name" tests/vm/test_attribution.py ;;
	links) # of Netfilter, from 6.4 on; the other tiers' kernel is older
		PACKET_HUNTER_KERNEL=${PACKET_HUNTER_KERNEL-6.12-deb13} tier links tests/vm/test_engine_ebpf.py -k "counts or link"
		;;
	*)
		echo "make test: no tier '$name'; TIERS is any of lint unit host vm attribution ebpf links" >&2
		exit 2
		;;
	esac
done
.venv/bin/python tests/summary.py "$results" "$tiers" || failed=1
exit "$failed"
