# SPDX-License-Identifier: MIT
"""The hunter as its users run it: a program of its own, real traffic, engine packet (root)."""

import contextlib
import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from hunter.show.columns import COLUMNS
from nlproto.client.frames import Kind, encode_json
from waiting import patient, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="engine packet needs root")

HUNTER = [sys.executable, "-m", "hunter"]
DAEMON = [sys.executable, "-m", "daemon"]

ECHO = """
import os, socket, sys
with socket.create_server(("127.0.0.1", 0)) as server:
    print(os.getpid(), server.getsockname()[1], flush=True)
    while True:
        peer, _ = server.accept()
        while data := peer.recv(65536):
            peer.sendall(data)
        peer.close()
"""

TALK = """
import socket, sys, time
time.sleep(float(sys.argv[3]))
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as peer:
    for _ in range(int(sys.argv[2])):
        peer.sendall(b"x" * 100)
        peer.recv(100, socket.MSG_WAITALL)
        time.sleep(0.01)
    time.sleep(float(sys.argv[4]))
"""


@contextlib.contextmanager
def echo():
    process = subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True)
    try:
        pid, port = map(int, process.stdout.readline().split())
        yield pid, port
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def server():
    with echo() as found:
        yield found


@pytest.fixture
def no_daemon(tmp_path):
    return ["--socket", str(tmp_path / "none.sock"), "--engine", "packet"]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    path = tmp_path_factory.mktemp("daemon") / "d.sock"
    log = open(path.with_suffix(".log"), "w+")
    process = subprocess.Popen(
        [*DAEMON, "--engine", "packet", "--socket", str(path), "--foreground"], stderr=log
    )

    def serves():
        assert process.poll() is None, path.with_suffix(".log").read_text()
        return path.exists()

    until(serves)
    yield str(path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(patient(20)) == 0
    log.close()


def hunt(*arguments, timeout=60, **options):
    return subprocess.run(
        [*HUNTER, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=patient(timeout),
        **options,
    )


# as nobody, who may still read this Python wherever it is installed
NOBODY = "setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all,+dac_read_search"
NOBODY = [
    *NOBODY.split(),
    "--ambient-caps=+dac_read_search",
    "--bounding-set=-all,+dac_read_search",
]


def hunt_as_nobody(*arguments):
    command = [*NOBODY, *HUNTER, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=patient(60))


def talk(port, times=5, wait=0.2):
    """Engine packet can name nobody whose socket is gone before it has asked: it stays a while."""
    words = (TALK, port, times, patient(wait), patient(0.3))
    return ["--all", "--", sys.executable, "-c", *map(str, words)]


@contextlib.contextmanager
def traffic(port):
    """Echoes on one connection until the end of the context."""
    ended = threading.Event()

    def run():
        with socket.create_connection(("127.0.0.1", port)) as peer:
            while not ended.wait(0.005):
                peer.sendall(b"x" * 50)
                peer.recv(50, socket.MSG_WAITALL)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def begun(process):
    """Wait for the greeting on stderr."""
    line = process.stderr.readline()
    while "Ctrl-C ends" not in line:
        assert line, "the hunter ended at once"
        line = process.stderr.readline()


def account_of(stderr):
    """The figures of the closing account, checked to close."""
    seen = re.search(r"(\d+) packets seen", stderr)
    records = re.search(r"(\d+) records = (\d+) delivered \+ (\d+) lost", stderr)
    shown = re.search(r"(\d+) (?:shown|saved) = (\d+) named.*? \+ (\d+) unnamed", stderr)
    assert seen and records and shown, stderr
    assert int(records[1]) == int(records[2]) + int(records[3])
    assert int(shown[1]) == int(shown[2]) + int(shown[3])
    return {
        "seen": int(seen[1]),
        "delivered": int(records[2]),
        "lost": int(records[3]),
        "shown": int(shown[1]),
        "named": int(shown[2]),
    }


def owners(rows, port):
    """pid of the records of either end of connections to `port`: (server's, client's)."""
    server, client = set(), set()
    for row in rows:
        own = row["sport"] if row["dir"] == "out" else row["dport"]
        (server if int(own) == port else client).add(row["pid"])
    return server, client


def test_alone_it_names_both_ends_and_its_account_closes(server, no_daemon):
    pid, port = server
    done = hunt(*no_daemon, "-n", "tcp", "port", port, *talk(port))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    to_server = [line for line in lines if " in  tcp 127.0.0.1." in line and f".{port} len" in line]
    assert len(to_server) >= 5
    assert all(re.search(rf" \S+\.{pid}\b", line) for line in to_server)
    account = account_of(done.stderr)
    assert account["shown"] == len(lines) and account["seen"] >= account["shown"]
    assert account["lost"] == 0


@pytest.mark.parametrize("way", ["alone", "daemon"])
def test_without_a_filter_all_that_was_delivered_is_shown(way, server, daemon, no_daemon, tmp_path):
    """The last packets of the command too, though the hunter ends with it."""
    _, port = server
    path = tmp_path / "x.jsonl"
    source = no_daemon if way == "alone" else ["--socket", daemon]
    done = hunt(*source, "--save", path, *talk(port))
    account = account_of(done.stderr)
    assert account["shown"] == account["delivered"] == len(path.read_text().splitlines())
    assert account["shown"] > 20


@pytest.mark.parametrize("way", ["daemon", "direct"])
def test_through_the_daemon_and_directly_it_names_both_ends(way, server, daemon, tmp_path):
    pid, port = server
    path = tmp_path / "x.jsonl"
    extra = ["--direct", "--engine", "packet"] if way == "direct" else []
    done = hunt("--socket", daemon, *extra, "--save", path, "port", port, *talk(port, 20))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) >= 80
    by_server, by_client = owners(rows, port)
    assert by_server == {pid}
    clients = by_client - {None}
    assert len(clients) == 1 and clients != {pid}
    assert {row["comm"] for row in rows if row["pid"]} <= {"python", "python3", "python3.11"} | {
        os.path.basename(sys.executable)
    }
    assert account_of(done.stderr)["shown"] == len(rows)


def test_without_root_it_works_through_the_daemon_and_shows_own_packets_only(server, daemon):
    _, port = server
    os.chmod(os.path.dirname(daemon), 0o755)
    done = hunt_as_nobody("--socket", daemon, "-n", "port", port, "--duration", "1")
    assert done.returncode == 0, done.stderr
    assert "packets of your own processes" in done.stderr
    assert done.stdout == ""


def test_without_root_and_daemon_it_says_what_helps():
    done = hunt_as_nobody("--engine", "packet", "--duration", "200ms", "port 80")
    assert done.returncode == 1
    told = re.fullmatch(r"packet-hunter: .*needs root.*: sudo (.*)\n", done.stderr)
    assert told, done.stderr
    # what it tells is typed
    helped = subprocess.run(
        told[1], shell=True, capture_output=True, text=True, timeout=patient(60)
    )
    assert helped.returncode == 0 and "packets seen" in helped.stderr, helped.stderr


def test_csv_has_the_agreed_columns_and_true_values(server, no_daemon, tmp_path):
    pid, port = server
    path = tmp_path / "capture.csv"
    before = time.time()
    done = hunt(*no_daemon, "--save", path, "port", port, *talk(port))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    with open(path, newline="") as file:
        assert file.readline() == ",".join(COLUMNS) + "\n"
        rows = list(csv.DictReader(file, COLUMNS))
    incoming = [row for row in rows if row["dir"] == "in" and row["dport"] == str(port)]
    assert {row["pid"] for row in incoming} == {str(pid)}
    assert {row["exe"] for row in incoming} == {os.path.realpath(f"/proc/{pid}/exe")}
    assert {(row["proto"], row["src"], row["dst"], row["uid"]) for row in rows} == {
        ("tcp", "127.0.0.1", "127.0.0.1", "0")
    }
    assert {row["netns"] for row in rows} == {str(os.stat("/proc/self/ns/net").st_ino)}
    assert 152 in [int(row["len"]) for row in rows]  # 20 IP + 32 TCP with timestamps + 100
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
    assert all(re.fullmatch(stamp, row["time"]) for row in rows)
    first = time.strptime(rows[0]["time"][:19], "%Y-%m-%dT%H:%M:%S")
    import calendar

    assert int(before) <= calendar.timegm(first) <= time.time()
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_saved_file_shows_the_same_through_r_and_filters(server, no_daemon, tmp_path):
    pid, port = server
    for name in ("x.csv", "x.jsonl"):
        path = tmp_path / name
        done = hunt(*no_daemon, "--save", path, "port", port, *talk(port))
        assert done.returncode == 0, done.stderr
        shown = account_of(done.stderr)["shown"]
        again = hunt("-r", path, "--json")
        assert again.returncode == 0, again.stderr
        rows = [json.loads(line) for line in again.stdout.splitlines()]
        assert len(rows) == shown
        if name == "x.jsonl":
            assert rows == [json.loads(line) for line in path.read_text().splitlines()]
        some = hunt("-r", path, "--json", "dst", "port", port, "and", "pid", pid)
        chosen = [json.loads(line) for line in some.stdout.splitlines()]
        assert chosen == [row for row in rows if row["dport"] == port and row["pid"] == pid]
        assert 0 < len(chosen) < len(rows)


def test_count_ends_after_exactly_n(server, no_daemon):
    _, port = server
    with traffic(port):
        done = hunt(*no_daemon, "--json", "-c", "7", "port", port)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 7


def test_duration_ends_by_itself(no_daemon):
    began = time.monotonic()
    done = hunt(*no_daemon, "--duration", "500ms")
    assert done.returncode == 0 and time.monotonic() - began >= 0.5
    account_of(done.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_with_0_and_the_account(number, server, no_daemon, tmp_path):
    _, port = server
    path = tmp_path / "x.csv"
    with traffic(port):
        process = subprocess.Popen(
            [*HUNTER, *no_daemon, "--save", path, "port", str(port)],
            stderr=subprocess.PIPE,
            text=True,
        )
        begun(process)
        until(lambda: path.read_text().count("\n") > 1)
        process.send_signal(number)
        stderr = process.communicate(timeout=patient(20))[1]
    assert process.returncode == 0
    assert account_of(stderr)["shown"] == len(path.read_text().splitlines()) - 1 > 0


def test_a_closed_pipe_ends_it_quietly_with_0(server, no_daemon):
    _, port = server
    with traffic(port):
        process = subprocess.Popen(
            [*HUNTER, *no_daemon, "-n", "port", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline()
        process.stdout.close()
        stderr = process.stderr.read()
        assert process.wait(20) == 0
    process.stderr.close()
    assert "Traceback" not in stderr and "Exception" not in stderr and "Broken" not in stderr
    account_of(stderr)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments", [["--help"], ["top", "--help"], ["--version"], ["who", "--port", "1"]]
)
def test_short_answers_end_well_whoever_reads_them(arguments, unbuffered):
    command = [*HUNTER, *arguments]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as closed, open("/dev/full", "wb") as full:
        for output, code, lines in ((closed, 0, 0), (full, 1, 1)):
            done = subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
                env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            )
            if unbuffered and output is full and "who" not in arguments:
                continue  # argparse itself passes over what it cannot write
            told = [line for line in done.stderr.splitlines() if "until then" not in line]
            assert (done.returncode, len(told)) == (code, lines), done.stderr
            assert not told or "cannot write to standard output: No space left" in told[0]


def test_after_sigkill_the_parquet_file_is_finished(server, no_daemon, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    _, port = server
    path = tmp_path / "x.parquet"
    with traffic(port):
        process = subprocess.Popen(
            [*HUNTER, *no_daemon, "--save", path, "--print", "port", str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun(process)
        shown = [process.stdout.readline() for _ in range(20)]  # a row is saved before it is shown
        process.kill()
        process.communicate()  # until the process that writes the file has ended too
    assert parquet.read_table(path).num_rows >= len(shown)


def test_after_sigkill_the_file_holds_whole_rows(server, no_daemon, tmp_path):
    _, port = server
    with traffic(port):
        for turn in range(5):
            path = tmp_path / f"{turn}.csv"
            process = subprocess.Popen(
                [*HUNTER, *no_daemon, "--save", path, "port", str(port)],
                stderr=subprocess.PIPE,
                text=True,
            )
            begun(process)
            until(lambda path=path: path.read_text().count("\n") > 1, 60)
            time.sleep(turn * 0.037)
            process.kill()
            process.communicate()
            text = path.read_text()
            assert text.endswith("\n")
            rows = list(csv.reader(text.splitlines()))
            assert len(rows) > 1 and all(len(row) == len(COLUMNS) for row in rows)


def test_options_narrow_as_the_filter_does(server, no_daemon):
    pid, port = server
    with traffic(port):
        for options, fits in [
            (["--pid", pid], lambda row: row["pid"] == pid),
            (["-Q", "in"], lambda row: row["dir"] == "in"),
            (["-Q", "out", "dst", "port", port], lambda row: row["dport"] == port),
            (["-i", "lo"], lambda row: row["src"] == row["dst"] == "127.0.0.1"),
            (["--uid", "root"], lambda row: row["uid"] == 0),
            (["--pid", os.getpid(), "--pid", pid], lambda row: row["pid"] in (pid, os.getpid())),
        ]:
            done = hunt(*no_daemon, "--json", "-c", "10", *options)
            rows = [json.loads(line) for line in done.stdout.splitlines()]
            assert len(rows) == 10 and all(map(fits, rows)), (options, rows[:3], done.stderr)


def test_a_filter_file_is_read_with_comments(server, no_daemon, tmp_path):
    _, port = server
    path = tmp_path / "filter"
    path.write_text(f"# what I care for\ntcp and\nport {port}\n")
    with traffic(port):
        done = hunt(*no_daemon, "-F", path, "--json", "-c", "3")
    assert all(
        port in (row["sport"], row["dport"]) for row in map(json.loads, done.stdout.splitlines())
    )


HOSTILE = [b"\x1b[2Jx", b"a\nb,c", b"[/red]", b"=cmd()", b"<script>", b"\xff\xfe", b'",""']

RENAMED = """
import ctypes, socket, sys
ctypes.CDLL(None).prctl(15, bytes.fromhex(sys.argv[1]), 0, 0, 0)
with socket.create_server(("127.0.0.1", 0)) as server:
    print(server.getsockname()[1], flush=True)
    peer, _ = server.accept()
    while data := peer.recv(100):
        peer.sendall(data)
"""


@pytest.mark.parametrize("name", HOSTILE, ids=[repr(name) for name in HOSTILE])
@pytest.mark.parametrize("output", ["lines", "json", "csv"])
def test_a_hostile_process_name_is_harmless(name, output, no_daemon):
    process = subprocess.Popen(
        [sys.executable, "-c", RENAMED, name.hex()], stdout=subprocess.PIPE, text=True
    )
    try:
        port = int(process.stdout.readline())
        options = {"lines": ["-n", "-vv"], "json": ["--json"], "csv": ["--save", "-"]}[output]
        with traffic(port):
            done = hunt(*no_daemon, *options, "-c", "8", "port", port)
    finally:
        process.kill()
        process.communicate()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")[:-1]
    assert len(lines) == 8 + (output == "csv")
    assert done.stdout.replace("\n", "").isprintable()
    if output == "csv":
        cells = [row[COLUMNS.index("comm")] for row in csv.reader(lines[1:])]
        assert all(len(row) == len(COLUMNS) for row in csv.reader(lines))
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)
    if output == "json":
        wanted = name.decode("utf-8", "backslashreplace")
        assert wanted in {json.loads(line)["comm"] for line in lines}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["prot", "80"], 2, "did you mean 'port'"),
        (["--nonsense"], 2, "--nonsense"),
        (["-c", "0"], 2, "above 0"),
        (["-i", "nowhere0"], 2, "no interface"),
        (["--"], 2, "a command must follow"),
        (["--save", "x.txt"], 2, "--format"),
        (["--save", "/proc/nothing/x.csv"], 1, "cannot write"),
        (["--", "/no/such/program"], 1, "cannot run"),
        (["-r", "/no/such.csv"], 1, "cannot read"),
        (["-v", "who"], 2, "before the options"),
        (["who"], 2, "--port N"),
        (["-F", "/no/such"], 1, "cannot read the filter"),
        (["stats"], 1, "start it with"),
        (["top"], 1, "needs a terminal"),
        (["--direct"], 1, "start it with"),
        (["--save", "/dev/full", "--format", "csv"], 1, "No space left"),
        (["--save", "/dev/full", "--format", "parquet"], 1, "No space left"),
        (["--save", "x.pcap"], 2, "x.pcapng"),
        (["--engine", "module", "tcp"], 1, "or use --engine packet"),
        (["annotate", "/no/such", "-o", "x.pcapng"], 1, "cannot read"),
        (["report", "/no/such.csv", "-o", "x.html"], 1, "cannot read"),
    ],
)
def test_a_mistake_is_one_clear_line_and_the_right_code(arguments, code, words, tmp_path):
    sockets = ["--socket", str(tmp_path / "none"), "--engine", "packet"]
    if arguments[:2] == ["--engine", "module"] and os.path.exists("/sys/module/sniffer"):
        pytest.skip("the module is loaded here")
    place = 1 if arguments[0] in ("who", "stats", "top", "annotate") else 0
    if arguments[0] in ("-v", "report", "--engine"):
        sockets = []
    elif arguments[0] in ("who", "stats", "annotate"):
        sockets = sockets[:2]
    done = hunt(*arguments[:place], *sockets, *arguments[place:])
    assert done.returncode == code, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["-c", "1"], ["top"], ["who", "--port", "80"], ["stats"], ["doctor"], ["--direct"]],
)
def test_a_socket_that_is_named_and_served_by_nobody_is_a_failure(arguments, tmp_path):
    """Packets of somewhere else would pass for the daemon's."""
    place = ["--socket", str(tmp_path / "none")]
    if arguments == ["top"]:
        master, slave = os.openpty()
        done = subprocess.run(
            [*HUNTER, "top", *place],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            timeout=60,
        )
        os.close(slave)
        told = os.read(master, 65536).decode()
        os.close(master)
    else:
        done = hunt(*arguments, *place)
        told = done.stderr if arguments != ["doctor"] else done.stdout
    assert done.returncode == 1
    assert f"no daemon answers at {tmp_path}/none" in told
    assert arguments == ["doctor"] or len(told.splitlines()) == 1


@contextlib.contextmanager
def answering(path, answer):
    """Something at `path` that answers the first request with `answer` and goes away."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)
        listener.settimeout(60)

        def serve():
            with contextlib.suppress(TimeoutError):  # nobody asked: the caller says why
                peer, _ = listener.accept()
                with peer:
                    peer.recv(1000)
                    peer.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


OTHER_RELEASE = {
    "id": 1,
    "ok": False,
    "error": "this daemon speaks protocol 2, not 1; install client and daemon of one release",
    "code": "usage",
}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (encode_json(Kind.CONTROL, OTHER_RELEASE), "of one release"),
        (b"SSH-2.0-OpenSSH_9.2 and more\n", "frame"),
        (b"", "try again"),
        (encode_json(Kind.CONTROL, OTHER_RELEASE)[:20], "try again"),
    ],
    ids=["another release", "another program", "nothing", "half an answer"],
)
def test_whoever_else_answers_at_the_socket_is_a_clear_failure(answer, words, tmp_path):
    path = str(tmp_path / "d.sock")
    with answering(path, answer):
        done = hunt("--socket", path)
    assert done.returncode == 1, done.stderr
    assert words in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_old_capture_survives_a_hunter_that_cannot_begin(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("precious")
    os.chmod(tmp_path, 0o777)
    os.chown(path, 65534, 65534)
    done = hunt_as_nobody("--engine", "packet", "--save", path)
    assert done.returncode == 1
    assert path.read_text() == "precious"


def test_root_refuses_a_directory_that_others_can_write(tmp_path):
    os.chmod(tmp_path, 0o777)
    done = hunt("--help", cwd=tmp_path)
    assert done.returncode == 1 and "others can write" in done.stderr


def ask_who(path, port, *words):
    return hunt("who", "--socket", path, "--port", port, "--json", *words)


def test_who_names_the_listener_with_and_without_the_daemon(server, daemon):
    pid, port = server
    with traffic(port):
        until(lambda: json.loads(ask_who(daemon, port).stdout)["flows"])
        for place in (["--socket", daemon], []):
            done = hunt("who", *place, "--port", port, "--json")
            assert done.returncode == 0, done.stderr
            answer = json.loads(done.stdout)
            listening = [
                one for one in answer["owners"] if one["listening"] and one["port"] == port
            ]
            assert [one["pid"] for one in listening] == [pid]
            people = hunt("who", *place, "--port", port)
            assert f"listens on tcp 127.0.0.1.{port}" in people.stdout
            assert f".{pid} " in people.stdout


def test_who_remembers_a_flow_that_is_over(daemon):
    with echo() as (pid, port), traffic(port):
        until(lambda: json.loads(ask_who(daemon, port).stdout)["flows"])
    until(lambda: not json.loads(ask_who(daemon, port).stdout)["owners"])
    flows = json.loads(ask_who(daemon, port, "--since", "1m").stdout)["flows"]
    assert {(flow["pid"], flow["lport"]) for flow in flows if flow["lport"] == port} == {
        (pid, port)
    }


def test_stats_for_machines_and_people(daemon):
    figures = json.loads(hunt("stats", "--socket", daemon, "--json").stdout)
    account = figures["account"]
    lost = sum(account["lost"].values())
    assert account["records"] == account["delivered"] + lost + account["waiting"]
    people = hunt("stats", "--socket", daemon).stdout
    assert "packets seen" in people and "engine packet" in people


def _start_daemon(path):
    process = subprocess.Popen(
        [*DAEMON, "--engine", "packet", "--socket", str(path), "--foreground"],
        stderr=subprocess.DEVNULL,
    )

    def serves():
        assert process.poll() is None
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            return True

    until(serves)
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_waits_for_a_daemon_that_goes_away_and_goes_on_with_the_next(number, server, tmp_path):
    path, saved = tmp_path / "d.sock", tmp_path / "out.csv"
    first = _start_daemon(path)
    second = None
    command = [*HUNTER, "--socket", str(path), "-n", "--save", str(saved), f"port {server[1]}"]
    hunter = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        begun(hunter)
        with traffic(server[1]):
            until(lambda: saved.read_text().count("\n") > 1)
            first.send_signal(number)
            first.wait(patient(20))
            assert "waiting for it to come back" in hunter.stderr.readline()
            second = _start_daemon(path)
            assert "the daemon is back after" in hunter.stderr.readline()
            before = len(saved.read_text().splitlines())
            until(lambda: len(saved.read_text().splitlines()) > before)
        hunter.send_signal(signal.SIGINT)
        _, err = hunter.communicate(timeout=patient(30))
    finally:
        for process in (hunter, first, second):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
    assert hunter.returncode == 0
    # engine packet starts anew with its daemon: nobody counted what passed between
    assert re.search(r"no daemon for \d+\.\d s: what passed then is lost, not counted", err)
    account = account_of(err)
    with saved.open() as file:
        assert account["shown"] == len(list(csv.DictReader(file)))
    assert account["delivered"] >= account["shown"] > 0
