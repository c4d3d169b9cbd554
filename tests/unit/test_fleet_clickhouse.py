# SPDX-License-Identifier: MIT
"""ClickHouse as a store: what is sent by HTTP, and where chdb is installed what becomes of it.

chdb is ClickHouse itself in a library (pip install chdb; 534 MB, so no test tool of ours).
"""

from __future__ import annotations

import importlib.util
import io
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pyarrow.parquet as pq
import pytest

from fleet import schema, wire
from fleet.collect.clickhouse import ClickHouseStore
from fleet.collect.tables import Received
from fleet.export.deltas import rows_of
from nlproto.errors import Error, UsageError
from playing import flows

DAY = 86400.0
BOOT = bytes(16)


class Stub:
    """Takes statements by HTTP; `answer(query, body)` does them, and raises to refuse."""

    def __init__(self, answer: Any) -> None:
        outer = self
        self.told: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                words = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.told.append((words["query"][0], body, self.headers))
                try:
                    answer(words["query"][0], body)
                    status, text = 200, b""
                except Exception as error:
                    status, text = 500, str(error).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://me:pass%20word@127.0.0.1:{self.server.server_port}/fleet"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()
        self.server.server_close()


def received(first: Any, count: int, sequence: Any, host: str = "h1") -> Received:
    made = rows_of(flows(first, count))
    made["first_ns"] = made["last_ns"] = time.time_ns()
    return Received(host, wire.decode(wire.encode_flows(BOOT, sequence, made, {})))


def told() -> Iterator[Any]:
    process = wire.ToldProcess(tgid=1, start_ns=2, at_ns=time.time_ns(), exe="/bin/x")
    account = wire.ToldAccount(time.time_ns(), 1, 1, 0, 0)
    for kind, one in ((wire.PROCS, process), (wire.ACCOUNT, account)):
        yield Received("h1", wire.decode(wire.encode(kind, BOOT, 9, [one])))


def test_each_table_is_made_once_and_gets_its_rows_as_parquet() -> None:
    with Stub(lambda query, body: None) as stub:
        store = ClickHouseStore(stub.url, 30 * DAY)
        store.write([received(0, 3, 1), received(0, 2, 1, "h2"), *told()])
        store.write([received(3, 1, 2)])
    made = [query for query, _, _ in stub.told if query.startswith("CREATE TABLE IF NOT EXISTS ")]
    assert [query.split()[5] for query in made] == list(schema.TABLES)
    inserts = [(query, body) for query, body, _ in stub.told if query.startswith("INSERT")]
    assert [query for query, _ in inserts] == [
        "INSERT INTO flows FORMAT Parquet",
        "INSERT INTO procs FORMAT Parquet",
        "INSERT INTO account FORMAT Parquet",
        "INSERT INTO flows FORMAT Parquet",
    ]
    table = pq.read_table(io.BytesIO(inserts[0][1]))
    assert table.num_rows == 5 and set(table["host"].to_pylist()) == {"h1", "h2"}
    assert all(
        headers["X-ClickHouse-Key"] == "pass word" and headers["X-ClickHouse-Database"] == "fleet"
        for _, _, headers in stub.told
    )


def test_what_it_refuses_is_one_line_without_the_password() -> None:
    def refuse(query: Any, body: Any) -> None:
        raise ValueError("Code: 60.\n no table")

    with Stub(refuse) as stub, pytest.raises(Error, match="Code: 60. no table") as caught:
        ClickHouseStore(stub.url, DAY).write([received(0, 1, 1)])
    assert "word" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(Error, match="refused"):
        ClickHouseStore("http://127.0.0.1:9/x", DAY).write([received(0, 1, 1)])
    for wrong in ("tcp://x", "http://", "http://x:port/y"):
        with pytest.raises(UsageError):
            ClickHouseStore(wrong, DAY)


@pytest.mark.skipif(not importlib.util.find_spec("chdb"), reason="needs chdb, of 534 MB")
def test_clickhouse_itself_keeps_each_row_once(tmp_path: Path) -> None:
    from chdb.session import Session

    session = Session(str(tmp_path / "chdb"))
    session.query("CREATE DATABASE fleet")
    session.query("USE fleet")

    def run(query: Any, body: Any) -> None:
        if body.strip():
            path = tmp_path / "body.parquet"
            path.write_bytes(body)
            query = query.replace("FORMAT Parquet", f"SELECT * FROM file('{path}', Parquet)")
        session.query(query)

    with Stub(run) as stub:
        store = ClickHouseStore(stub.url, 30 * DAY)
        batches = [received(0, 300, 1), received(0, 200, 1, "h2"), *told()]
        store.write(batches)
        ClickHouseStore(stub.url, 30 * DAY).write(batches[:1])

    def one(query: Any) -> Any:
        return session.query(query, "TabSeparated").bytes().decode().strip()

    try:
        assert one("SELECT count(), uniqExact(cookie) FROM flows FINAL") == "500\t300"
        assert one("SELECT host, raddr, how, domain IS NULL FROM flows FINAL LIMIT 1")
        assert one("SELECT sum(bytes_out) FROM flows FINAL WHERE rport = 5432") == str(500 * 60)
        assert one("SELECT name, empty(parents) FROM procs FINAL") == "x\t1"
        assert one("SELECT exported FROM account FINAL") == "1"
    finally:
        session.close()
