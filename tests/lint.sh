#!/bin/sh
# SPDX-License-Identifier: MIT
# make lint: every check, and a failure if one of them complains.
set -u
failed=0
check() {
	echo "lint: $1"
	shift
	"$@" || failed=1
}
check ruff .venv/bin/ruff check -q python tests bench man examples
check "mypy --strict" .venv/bin/mypy --no-error-summary
# shellcheck disable=SC2046 # one word a file
check shellcheck shellcheck $(find . -name '*.sh' -not -path './.venv/*') .ci/run python/scripts/*
if [ "${PACKET_HUNTER_KERNEL-}" != own ]; then
	check "sparse on kmod" env PYTHONPATH=tests/vm .venv/bin/python -m vmtest.sparse
fi
exit "$failed"
