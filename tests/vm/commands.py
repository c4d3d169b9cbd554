# SPDX-License-Identifier: MIT
"""The module's command that no program of ours gives: SNIFFER_CMD_SET_CONFIG (docs/PROTOCOL.md)."""

from __future__ import annotations

import struct

import numpy as np

from nlproto.kernel.netlink import Sniffer, encode_attribute
from nlproto.records import wire
from nlproto.records.wire import lib

__all__ = ["configure"]

_U32 = struct.Struct("=I")


def configure(sniffer: Sniffer, batch: int | None = None, flush_ms: int | None = None) -> np.void:
    """Set records a message and the flush interval in ms (None: leave); return the new INFO."""
    wanted = {lib.SNIFFER_A_BATCH: batch, lib.SNIFFER_A_FLUSH_MS: flush_ms}
    payload = b"".join(
        encode_attribute(kind, _U32.pack(value))
        for kind, value in wanted.items()
        if value is not None
    )
    return wire.decode_struct(
        sniffer._one(lib.SNIFFER_CMD_SET_CONFIG, lib.SNIFFER_A_INFO, payload), wire.INFO
    )
