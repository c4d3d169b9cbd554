#!/bin/sh
# SPDX-License-Identifier: MIT
# make test [TIERS="..."]: all tiers, also when one failed; then the summary, which names what was
# left out. The guests' tiers run beside the others: an emulated guest takes one processor.
set -u
tiers=${1:-lint unit host vm attribution ebpf links}
export PYTHONUNBUFFERED=1
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

play() { # NAME
	case $1 in
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
	attribution | ebpf) tier "$1" tests/vm/test_attribution.py ;;
	links) # of Netfilter, from 6.4 on; the other tiers' kernel is older
		PACKET_HUNTER_KERNEL=${PACKET_HUNTER_KERNEL-6.12-deb13} tier links tests/vm/test_engine_ebpf.py -k "counts or link"
		;;
	esac
}

if [ -n "${BESIDE-}" ]; then # started below: results go there
	results=$BESIDE
	for name in $tiers; do
		play "$name"
	done
	exit "$failed"
fi

here=
guests=
for name in $tiers; do
	case $name in
	lint | unit | host) here="$here $name" ;;
	vm | attribution | ebpf | links) guests="$guests $name" ;;
	*)
		echo "make test: no tier '$name'; TIERS is any of lint unit host vm attribution ebpf links" >&2
		exit 2
		;;
	esac
done
results=$(mktemp -d)
beside=
trap 'rm -rf "$results"' EXIT
# a group of its own, so that all of it can be ended
trap '[ -z "$beside" ] || { kill -TERM "-$beside"; wait "$beside"; }; exit 130' INT TERM
# With the module in this very machine nothing else may run.
if [ -n "$here" ] && [ -n "$guests" ] && [ "${PACKET_HUNTER_KERNEL-}" != own ] && [ "$(nproc)" -gt 1 ]; then
	BESIDE=$results setsid sh "$0" "$guests" >"$results/guests" 2>&1 </dev/null &
	beside=$!
	guests=
	echo "make test: beside these run the guests' tiers; what they say comes after host"
fi
for name in $here $guests; do
	play "$name"
done
if [ -n "$beside" ]; then
	tail -n +1 -f --pid="$beside" "$results/guests"
	wait "$beside" || failed=1
fi
.venv/bin/python tests/summary.py "$results" "$tiers" || failed=1
exit "$failed"
