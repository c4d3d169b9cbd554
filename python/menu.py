# SPDX-License-Identifier: MIT
"""make menu: what is built, loaded and running in this tree, and one key for each thing to do.

Not installed: it works on a source tree. `state` looks, `ACTIONS` says which command does what.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nlproto import Error
from nlproto.client.client import DaemonClient
from nlproto.client.frames import DEFAULT_SOCKET
from nlproto.errors import NoPrivilege
from nlproto.kernel.loading import advice
from nlproto.kernel.netlink import Sniffer

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
BUILT = ROOT / "kmod" / "sniffer.ko"
MODULE = Path("/sys/module/sniffer")
_SETTLE = 20.0  # s, for a daemon that starts or ends


@dataclass(frozen=True, slots=True)
class Action:
    """`command` runs in ROOT; `privileged` ones by sudo unless we are root.

    `blocked` says why it cannot be done now.
    """

    key: str
    text: str
    command: Sequence[str]
    privileged: bool = False
    background: bool = False
    blocked: str = ""


def actions(socket: str, daemon_pid: int | None) -> dict[str, Action]:
    """What each key does now."""
    hunter = (PYTHON, "-m", "hunter")
    # a daemon that is named must be there
    place = () if daemon_pid is None else ("--socket", socket)
    loading = advice(tree=ROOT)
    loaded = MODULE.exists()
    found = [
        Action("b", "build everything", ("./build.sh", "--try-module")),
        Action(
            "l",
            "load the module",
            tuple(loading.command.split()),
            privileged=True,
            blocked="it is loaded" if loaded else "" if loading.command else loading.text,
        ),
        Action(
            "u",
            "unload the module",
            ("rmmod", "sniffer"),
            privileged=True,
            blocked="" if loaded else "not loaded",
        ),
        Action(
            "s",
            "start the daemon",
            (PYTHON, "-m", "daemon", "--foreground", "--socket", socket),
            privileged=True,
            background=True,
            blocked="" if daemon_pid is None else "it runs",
        ),
        Action(
            "x",
            "stop the daemon",
            ("kill", str(daemon_pid)),
            privileged=True,
            blocked="not running" if daemon_pid is None else "",
        ),
        Action("h", "hunt (Ctrl-C ends it)", (*hunter, *place), privileged=True),
        Action("t", "top", (*hunter, "top", *place), privileged=True),
        Action("d", "demo in a virtual machine", ("make", "demo")),
        Action("c", "doctor", (*hunter, "doctor", *place), privileged=True),
    ]
    return {action.key: action for action in found}


def state(socket: str) -> tuple[list[tuple[str, str]], int | None]:
    """(part, what it is doing) for each part, and the daemon's pid."""
    rows = [("built", f"module for {_kernel_of(BUILT)}" if BUILT.exists() else "no module")]
    if MODULE.exists():
        version = (MODULE / "version").read_text().strip()
        users = (MODULE / "refcnt").read_text().strip()
        rows += [("module", f"loaded, version {version}, {users} users"), ("probes", _probes())]
    else:
        rows += [("module", "not loaded"), ("probes", "-")]
    try:
        with DaemonClient(socket) as client:
            figures = client.stats()
    except Error:
        return [*rows, ("daemon", "not running"), ("clients", "-")], None
    # This question came from a client as well.
    told = figures.get("clients")
    clients = str(int(told["connected"]) - 1) if told else "only root can see them"
    daemon = f"pid {figures['pid']}, engine {figures['engine']}"
    return [*rows, ("daemon", daemon), ("clients", clients)], int(figures["pid"])


def _kernel_of(module: Path) -> str:
    command = [shutil.which("modinfo") or "/sbin/modinfo", "-F", "vermagic", str(module)]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        text = ""
    release = (text.split() or ["an unknown kernel"])[0]
    running = os.uname().release
    return release if release == running else f"{release}, but this kernel is {running}"


def _probes() -> str:
    try:
        with Sniffer() as sniffer:
            info = sniffer.info()
    except NoPrivilege:
        return "only root can see them"
    except Error as error:
        return str(error)
    if not info["canary"]:
        return "none fire: kprobes are switched off"
    registered = int(info["probes_registered"]).bit_count()
    return f"{registered} registered, {int(info['probes_firing']).bit_count()} seen to fire"


def show(console: Console, rows: Sequence[tuple[str, str]], keys: dict[str, Action]) -> None:
    """Print the state and the keys."""
    table = Table("part", "state", box=box.SIMPLE_HEAD, title="packet-hunter")
    for part, what in rows:
        table.add_row(part, Text(what))
    console.print(table)
    for action in keys.values():
        if action.blocked:
            text = f"  [dim]{action.key}  {action.text} ({action.blocked})[/dim]"
        else:
            text = f"  [bold]{action.key}[/bold]  {action.text}"
        console.print(text, highlight=False)
    console.print("  [bold]q[/bold]  quit   (Enter looks again)", highlight=False)


def perform(action: Action, console: Console) -> subprocess.Popen[bytes] | None:
    """Run one action to its end; Ctrl-C ends it and not the menu. Return what still runs."""
    command = list(action.command)
    if action.privileged and os.geteuid() != 0:
        command = ["sudo", *command]
    console.print(Text(f"$ {' '.join(command)}"))
    if action.background:
        log = ROOT / "build" / "daemon.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            started = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        console.print(Text(f"started; it writes to {log.relative_to(ROOT)}"))
        return started
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen(command, cwd=ROOT, preexec_fn=_listen_to_interrupt)
        code = process.wait()
    except OSError as error:
        console.print(Text(f"{command[0]}: {error.strerror}"))
        return None
    finally:
        signal.signal(signal.SIGINT, before)
    console.print(Text("done" if code == 0 else f"failed, exit {code}"))
    return None


def settle(
    action: Action, socket: str, pid: int | None, started: subprocess.Popen[bytes] | None
) -> None:
    """Wait until the daemon that an action started or stopped is, or is not, there."""
    until = time.monotonic() + _SETTLE
    while time.monotonic() < until:
        if started is not None:
            if started.poll() is not None or _answers(socket):
                return
        elif action.key != "x" or not Path(f"/proc/{pid}").exists() or _is_zombie(pid):
            return
        time.sleep(0.05)


def _answers(socket: str) -> bool:
    try:
        DaemonClient(socket).close()
    except Error:
        return False
    return True


def _is_zombie(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _listen_to_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> int:
    console = Console()
    if not sys.stdin.isatty():
        print("menu: needs a terminal; make help lists what it does", file=sys.stderr)
        return 2
    socket = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_SOCKET
    running: list[subprocess.Popen[bytes]] = []
    while True:
        running = [process for process in running if process.poll() is None]
        rows, pid = state(socket)
        keys = actions(socket, pid)
        show(console, rows, keys)
        try:
            key = input("> ").strip().lower()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return 0
        if key == "q":
            return 0
        if key in keys and keys[key].blocked:
            console.print(Text(f"{keys[key].text}: {keys[key].blocked}"))
        elif key in keys:
            started = perform(keys[key], console)
            settle(keys[key], socket, pid, started)
            if started is not None:
                running.append(started)
                if started.poll() is not None:
                    console.print(Text("it has ended; its last words are in that file"))
        elif key:
            console.print(Text(f"{key!r} is no key of this menu"))


if __name__ == "__main__":
    sys.exit(main())
