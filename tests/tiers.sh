#!/bin/sh
# SPDX-License-Identifier: MIT
# make test: one tier after the other, each goes on when another failed; then the summary.
set -u
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
	# shellcheck disable=SC2086 # words are wanted
	$as .venv/bin/python -m pytest -q --junitxml="$results/$name.xml" -o junit_suite_name="$name" "$@" || failed=1
}

echo "=== lint"
if sh tests/lint.sh; then lint=passed; else lint=failed failed=1; fi
tier unit tests/unit
tier host tests/host
tier vm tests/vm --ignore tests/vm/test_attribution.py
tier attribution tests/vm/test_attribution.py
.venv/bin/python tests/summary.py "$lint" "$results" || failed=1
exit "$failed"
