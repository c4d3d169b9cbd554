# SPDX-License-Identifier: MIT
"""The same tables in ClickHouse, over HTTP, for sites that have one.

A batch that comes again makes rows with the same key. ReplacingMergeTree keeps one of them: ask
with FINAL. The table's TTL removes old rows.
"""

from __future__ import annotations

import io
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from fleet import schema
from fleet.collect.tables import Received, Span, hours_of
from nlproto.errors import Error, UsageError

__all__ = ["ClickHouseStore", "create"]

_TIMEOUT = 30.0  # s
_TYPES = {
    pa.uint8(): "UInt8",
    pa.uint16(): "UInt16",
    pa.uint32(): "UInt32",
    pa.uint64(): "UInt64",
    pa.int64(): "Int64",
    pa.bool_(): "Bool",
    pa.string(): "String",
}
_BATCH = ("host", "boot", "sequence")
_FLOW = ("netns", "cookie", "tgid", "start_ns", "laddr", "lport", "protocol", "first_ns")
_KEYS = {
    "flows": ("rport", "raddr", "last_ns", *_BATCH, *_FLOW),
    "procs": ("host", "boot", "tgid", "start_ns", "at_ns", "sequence"),
    "account": ("host", "boot", "at_ns", "sequence"),
}
_TIME = {"flows": "last_ns", "procs": "at_ns", "account": "at_ns"}
_SECOND = 10**9


class ClickHouseStore:
    """Writes into the database that `url` names: http(s)://[USER:PASSWORD@]HOST:PORT/DATABASE.

    Rows older than `keep_s` seconds are refused, and removed. Raises UsageError.
    """

    def __init__(self, url: str, keep_s: float) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            right = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:
            right = False
        if not right:
            raise UsageError(
                f"'{url}' is no address of ClickHouse: write https://HOST:8443/DATABASE"
            )
        self.keep_s = keep_s
        self._span = Span(keep_s)
        self._where = parts.netloc.rpartition("@")[2]
        self._url = f"{parts.scheme}://{self._where}/"
        self._database = parts.path.strip("/") or "default"
        self._headers = {"X-ClickHouse-Database": self._database}
        if parts.username:
            self._headers["X-ClickHouse-User"] = urllib.parse.unquote(parts.username)
            self._headers["X-ClickHouse-Key"] = urllib.parse.unquote(parts.password or "")
        self._made = False

    def write(self, received: Sequence[Received]) -> None:
        """Return when ClickHouse has stored all of it. Raises Error."""
        if not self._made:
            for kind in schema.TABLES:
                self._send(create(kind, self.keep_s))
            self._made = True
        hours, _ = hours_of(received, self._span.now())
        for kind in schema.TABLES:
            tables = [hour.table for hour in hours if hour.kind == kind]
            if tables:
                body = io.BytesIO()
                pq.write_table(pa.concat_tables(tables).unify_dictionaries(), body)
                self._send(f"INSERT INTO {kind} FORMAT Parquet", body.getvalue())

    def _send(self, query: str, body: bytes = b"") -> None:
        words = {"query": query} | ({"wait_end_of_query": "1"} if body else {})
        request = urllib.request.Request(
            f"{self._url}?{urllib.parse.urlencode(words)}",
            data=body or b"\n",
            headers=self._headers,
            method="POST",
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            told = " ".join(error.read(300).decode("utf-8", "replace").split())
            raise Error(f"ClickHouse at {self._where}: {told or error}") from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise Error(f"ClickHouse at {self._where}: {reason}") from None


def create(kind: str, keep_s: float) -> str:
    """Return the statement that makes a table of schema.TABLES if it does not exist."""
    key = _KEYS[kind]
    columns = ", ".join(
        f"{field.name} {_type(field.type, field.name not in key)}" for field in schema.TABLES[kind]
    )
    at = f"toDateTime(intDiv({_TIME[kind]}, {_SECOND}))"
    return (
        f"CREATE TABLE IF NOT EXISTS {kind} ({columns}) ENGINE = ReplacingMergeTree"
        f" PARTITION BY toDate({at}) ORDER BY ({', '.join(key)})"
        f" TTL {at} + toIntervalSecond({int(keep_s)})"
    )


def _type(kind: pa.DataType, may_lack: bool) -> str:
    if pa.types.is_list(kind):
        return "Array(String)"
    word = pa.types.is_dictionary(kind)
    name = _TYPES[kind.value_type if word else kind]
    name = f"Nullable({name})" if may_lack else name
    return f"LowCardinality({name})" if word else name
