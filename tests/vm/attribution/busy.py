# SPDX-License-Identifier: MIT
"""CPU load beside a scenario."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator


def _spin() -> None:
    while True:
        sum(range(100_000))


@contextlib.contextmanager
def busy(processes_a_cpu: int) -> Iterator[None]:
    """Keep every CPU busy with so many processes inside the context."""
    context = multiprocessing.get_context("fork")
    count = processes_a_cpu * (os.cpu_count() or 1)
    spinners = [context.Process(target=_spin, daemon=True) for _ in range(count)]
    for spinner in spinners:
        spinner.start()
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.join()
