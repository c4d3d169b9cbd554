# SPDX-License-Identifier: MIT
"""The connection to the fleet's server: NATS with JetStream, three subjects for each host."""

from __future__ import annotations

import logging
import random
import ssl
import time
from collections.abc import Awaitable, Callable

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import (
    AckPolicy,
    ConsumerConfig,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)

from fleet import keys
from fleet.options import FleetServer
from fleet.subjects import CONSUMER, STREAM, SUBJECTS, inbox_of
from nlproto.errors import Error

__all__ = [
    "FAILURES",
    "backoff",
    "connect",
    "ensure_stream",
    "one_more",
    "words",
]

ACK_WAIT = 120.0
"""Seconds after which the server gives a batch to another collector."""
_DUPLICATES = 600.0
"""Seconds for which the server remembers a batch by its Nats-Msg-Id."""
_PENDING = 20_000
"""The most batches that collectors hold without an acknowledgement."""
_LONGEST = 60.0
FAILURES = (nats.errors.Error, OSError, TimeoutError, EOFError)
"""Errors that the server, or the connection to it, causes in a client."""

log = logging.getLogger(__name__)
logging.getLogger("nats").setLevel(logging.CRITICAL)  # it repeats what we tell
logging.getLogger("asyncio").setLevel(logging.ERROR)  # a TLS connection that ends is no news


def words(error: BaseException) -> str:
    """Return one line about one of FAILURES."""
    if isinstance(error, nats.js.errors.NoStreamResponseError):
        return f"it has no stream {STREAM}, which the first packet-hunter-collect makes"
    return str(error) or type(error).__name__


def one_more(failures: int, begun: float) -> int:
    """Return the number of failures in a row, after a connection since `begun` (monotonic)."""
    return failures + 1 if time.monotonic() - begun < _LONGEST else 1


def backoff(failures: int) -> float:
    """Return seconds to wait after so many failures. Two hosts wait for different times."""
    return random.uniform(0.5, 1.0) * min(_LONGEST, 2.0 ** min(failures, 10))


async def connect(
    server: FleetServer, name: str, told: Callable[[Exception], Awaitable[None]]
) -> Client:
    """Connect once. A caller that loses the connection calls again. Raises Error, one of FAILURES.

    `told` gets later refusals of the server.
    """
    tls = None
    if server.ca or any(url.startswith("tls:") for url in server.urls):
        try:
            tls = ssl.create_default_context(cafile=server.ca)
        except (OSError, ssl.SSLError) as error:
            raise Error(f"cannot read certificates in {server.ca}: {error}") from None
        tls.minimum_version = ssl.TLSVersion.TLSv1_2
    seed = None if server.nkey is None else keys.read(server.nkey)
    try:
        return await nats.connect(
            list(server.urls),
            name=name,
            tls=tls,
            nkeys_seed_str=seed,
            # nobody can read another one's answers
            inbox_prefix=inbox_of(name),
            error_cb=told,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            connect_timeout=20,
            ping_interval=20,
            max_outstanding_pings=2,
        )
    except (*FAILURES, ssl.SSLError) as error:
        raise Error(f"{', '.join(server.urls)}: {words(error)}") from None


async def ensure_stream(jetstream: JetStreamContext, replicas: int = 1) -> None:
    """Make the stream and its consumer, unless they exist. Raises one of FAILURES.

    A batch stays until a collector has stored it. A full stream takes nothing, so hosts keep their
    batches.
    """
    try:
        await jetstream.stream_info(STREAM)
    except nats.js.errors.NotFoundError:
        await jetstream.add_stream(
            StreamConfig(
                name=STREAM,
                subjects=list(SUBJECTS),
                retention=RetentionPolicy.WORK_QUEUE,
                discard=DiscardPolicy.NEW,
                storage=StorageType.FILE,
                duplicate_window=_DUPLICATES,
                num_replicas=replicas,
            )
        )
    try:
        await jetstream.consumer_info(STREAM, CONSUMER)
    except nats.js.errors.NotFoundError:
        await jetstream.add_consumer(
            STREAM,
            ConsumerConfig(
                durable_name=CONSUMER,
                ack_policy=AckPolicy.EXPLICIT,
                ack_wait=ACK_WAIT,
                max_ack_pending=_PENDING,
            ),
        )
