#!/bin/sh
# SPDX-License-Identifier: MIT
# make test-matrix: the module's tests on every kernel of the matrix, one line each.
set -u
failed=0
table=
for kernel in 5.10 6.1 6.12-deb12 6.12-deb13 7.2 7.3; do
	echo "=== $kernel"
	if PACKET_HUNTER_KERNEL=$kernel .venv/bin/python -m pytest -q tests/vm --ignore tests/vm/test_attribution.py; then
		row=passed
	else
		row=FAILED failed=1
	fi
	table="$table$(printf '%-12s %s' "$kernel" "$row")
"
done
printf '\n%s' "$table"
exit "$failed"
