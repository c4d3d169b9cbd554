# SPDX-License-Identifier: MIT
"""What engine ebpf has told until now, and what is attached to the kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nlproto.engines.engine import Engine
from nlproto.pipeline.account import Account
from nlproto.records.wire import RECORD, Batch

__all__ = ["links", "records_of"]


def links() -> int:
    """How many programs are attached, by whomever."""
    count = 0
    for info in Path("/proc").glob("[0-9]*/fdinfo/*"):
        try:
            count += "link_type" in info.read_text()
        except OSError:
            continue
    return count


def records_of(engine: Engine, account: Account) -> np.ndarray:
    """Everything until now, counted."""
    parts = [np.zeros(0, RECORD)]
    for event in (*engine.read(0.1), *engine.finish()):
        if isinstance(event, Batch):
            account.add(event.head, event.records)
            account.deliver(event.records["how"])
            parts.append(event.records)
    account.close(engine.closing)
    return np.concatenate(parts)
