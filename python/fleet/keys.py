# SPDX-License-Identifier: MIT
"""The keys of hosts and collectors, and what the server lets each of them do."""

from __future__ import annotations

import os

import nkeys

from fleet.subjects import CONSUMER, STREAM, inbox_of
from fleet.wire import KINDS
from nlproto.errors import Error

__all__ = ["make", "read", "user"]

_LONGEST = 1000
"""Characters of a file that may have a seed, of some 60."""

_COLLECTS: tuple[str, ...] = (
    f"$JS.API.STREAM.INFO.{STREAM}",
    f"$JS.API.STREAM.CREATE.{STREAM}",
    f"$JS.API.CONSUMER.INFO.{STREAM}.{CONSUMER}",
    f"$JS.API.CONSUMER.CREATE.{STREAM}.{CONSUMER}",
    f"$JS.API.CONSUMER.DURABLE.CREATE.{STREAM}.{CONSUMER}",
    f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{CONSUMER}",
    f"$JS.ACK.{STREAM}.{CONSUMER}.>",
)


def make(path: str) -> str:
    """Write the seed of a new key into `path`, readable for its owner only. Returns the public key.

    Raises Error, also if the file exists.
    """
    seed: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(seed + b"\n")
    except OSError as error:
        raise Error(f"cannot make the key {path}: {error.strerror}") from None
    public: bytes = nkeys.from_seed(bytearray(seed)).public_key
    return public.decode()


def read(path: str) -> str:
    """Return the seed in `path`. Raises Error."""
    try:
        with open(path, encoding="ascii") as file:
            seed = file.read(_LONGEST).strip()
        nkeys.from_seed(bytearray(seed, "ascii"))
    except (OSError, ValueError, nkeys.NkeysError) as error:
        raise Error(f"cannot read the nkey in {path}: {error}") from None
    return seed


def user(public: str, host: str | None) -> str:
    """Return the line for `host` in nats-server's `authorization.users`; None: for collectors."""
    may = _COLLECTS if host is None else tuple(f"{kind}.{host}" for kind in KINDS.values())
    inbox = inbox_of("collector" if host is None else host)
    publish = ", ".join(f'"{subject}"' for subject in may)
    permissions = f'publish: [{publish}], subscribe: ["{inbox}.>"]'
    return f"{{ nkey: {public}, permissions: {{ {permissions} }} }}"
