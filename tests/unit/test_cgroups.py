# SPDX-License-Identifier: MIT
"""Units and containers by cgroup path: what systemd and runtimes make, and what passes for it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nlproto.host import cgroups
from nlproto.host.cgroups import path_of, place_of

ID = "4f1c0d2e9a3b" + "0" * 52
USER = "/user.slice/user-1000.slice/user@1000.service"


@pytest.mark.parametrize(
    ("cgroup", "unit", "container"),
    [
        ("/", "", ""),
        ("/system.slice/ssh.service", "ssh.service", ""),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope", ""),
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/app-x.service",
            "user@1000.service/app-x.service",
            "",
        ),
        (f"/system.slice/docker-{ID}.scope", f"docker-{ID}.scope", "docker:4f1c0d2e9a3b"),
        (f"/docker/{ID}", "", "docker:4f1c0d2e9a3b"),
        (f"/machine.slice/libpod-{ID}.scope", f"libpod-{ID}.scope", "podman:4f1c0d2e9a3b"),
        (
            f"/machine.slice/libpod-{ID}.scope/container",
            f"libpod-{ID}.scope",
            "podman:4f1c0d2e9a3b",
        ),
        (
            f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope",
            f"cri-containerd-{ID}.scope",
            "containerd:4f1c0d2e9a3b",
        ),
        (
            f"/kubepods.slice/kubepods-pod1.slice/crio-{ID}.scope",
            f"crio-{ID}.scope",
            "crio:4f1c0d2e9a3b",
        ),
        (f"/kubepods/burstable/pod12/{ID}", "", "kubernetes:4f1c0d2e9a3b"),
        ("/lxc.payload.web/system.slice/nginx.service", "", "lxc:web"),
        ("/lxc/web", "", "lxc:web"),
        ("/lxc.payload/web/ns", "", "lxc:web"),
        ("/lxc.monitor.web", "", ""),
        (f"/libpod_parent/libpod-{ID}", "", "podman:4f1c0d2e9a3b"),
        (f"/machine.slice/libpod-conmon-{ID}.scope", f"libpod-conmon-{ID}.scope", ""),
        (
            f"/machine.slice/machine-libpod_pod_{ID}.slice/libpod-{ID}.scope/container",
            f"libpod-{ID}.scope",
            "podman:4f1c0d2e9a3b",
        ),
        (f"/ecs/{ID}", "", "container:4f1c0d2e9a3b"),
        (f"/system.slice/nerdctl-{ID}.scope", f"nerdctl-{ID}.scope", "container:4f1c0d2e9a3b"),
        (f"/kubepods/podab-cd/{ID}", "", "kubernetes:4f1c0d2e9a3b"),
        (f"/kubepods/besteffort/podab-cd/crio-{ID}/container", "", "crio:4f1c0d2e9a3b"),
        (
            f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podab_cd.slice/{ID}",
            "",
            "kubernetes:4f1c0d2e9a3b",
        ),
        (
            f"/system.slice/containerd.service/kubepods-burstable-podab.slice:cri-containerd:{ID}",
            "containerd.service",
            "containerd:4f1c0d2e9a3b",
        ),
        (
            f"/system.slice/docker-{ID}.scope/kubelet.slice/cri-containerd-{'1' * 64}.scope",
            f"docker-{ID}.scope",
            "docker:4f1c0d2e9a3b",
        ),
        ("/init.scope", "init.scope", ""),
        ("/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service", ""),
        ("/system.slice/_cpu.service", "cpu.service", ""),
        ("/system.slice/dev-disk-by\\x2duuid.swap", "dev-disk-by\\x2duuid.swap", ""),
        (USER, "user@1000.service", ""),
        (f"{USER}/init.scope", "user@1000.service/init.scope", ""),
        (
            f"{USER}/user.slice/libpod-{ID}.scope/container",
            f"user@1000.service/libpod-{ID}.scope",
            "podman:user@1000/4f1c0d2e9a3b",
        ),
        (
            f"{USER}/app.slice/web.service/libpod-payload-{ID}",
            "user@1000.service/web.service",
            "podman:user@1000/4f1c0d2e9a3b",
        ),
        (
            "/machine.slice/systemd-nspawn@db.service/payload",
            "systemd-nspawn@db.service",
            "nspawn:db",
        ),
        ("/machine.slice/machine-qemu1.scope", "machine-qemu1.scope", "machine:qemu1"),
    ],
)
def test_unit_and_container_are_read_from_the_cgroup_path(
    cgroup: Any, unit: str, container: str
) -> None:
    assert cgroups.unit_of(cgroup) == unit
    assert cgroups.container_of(cgroup) == container


@pytest.mark.parametrize("below", [USER, "/system.slice/delegated.service", "/lxc.payload.web"])
@pytest.mark.parametrize(
    "forged",
    [
        "/system.slice/sshd.service",
        "/sshd.service",
        "/a\x0c0::/system.slice/sshd.service",
        "/a\r0::/system.slice/sshd.service",
        "/a\u20280::/system.slice/sshd.service",
        "/-.slice/system.slice/sshd.service",
        "/user.slice/user-0.slice/user@0.service/sshd.service",
        "/../../system.slice/sshd.service",
        f"/docker-{ID}.scope",
        f"/docker/{ID}",
        f"/system.slice/docker-{ID}.scope",
        f"/libpod-{ID}.scope",
        f"/libpod_parent/libpod-{ID}",
        f"/kubepods/burstable/pod1/{ID}",
        f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope",
        f"/x:cri-containerd:{ID}",
        f"/crio-{ID}.scope",
        f"/{ID}",
        "/lxc/db",
        "/lxc.payload.db",
        "/machine.slice/systemd-nspawn@db.service/payload",
        "/machine.slice/machine-db.scope",
    ],
)
def test_what_a_user_makes_below_a_place_of_his_passes_for_nothing_else(
    below: Any, forged: str
) -> None:
    place = place_of(below + forged)
    own = place_of(below)
    assert place.unit == own.unit or place.unit.startswith(f"{own.unit}/")
    assert place.container == own.container or ":user@1000/" in place.container


@pytest.mark.parametrize(
    "path",
    [
        "/alice/system.slice/sshd.service",
        "/alice.slice/system.slice/sshd.service",
        "/../system.slice/sshd.service",
        f"/../docker/{ID}",
        f"/alice/docker/{ID}",
        f"/alice/docker-{ID}.scope",
        f"/alice/x/{ID}",
        "/alice/lxc/web",
        "/system.slice/sshd.service\n",
        "/system.slice/ssh d.service",
        "/system.slice/@.service",
        "/system.slice/.service",
        "/system.slice/sshd.service (deleted)",
        "/",
        "",
    ],
)
def test_places_where_nobody_makes_any_are_none(path: str) -> None:
    assert place_of(path) == cgroups.NOWHERE


@pytest.mark.parametrize(
    ("given_away", "path"),
    [
        ("new.slice", "/new.slice/sshd.service"),
        ("new.slice", f"/new.slice/docker-{ID}.scope"),
        ("new.slice", "/new.slice/new-a.slice/user@0.service/x.service"),
        ("alice", f"/alice/{ID}"),
        ("docker", f"/docker/{ID}"),
        ("lxc", "/lxc/web"),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give directories away")
@pytest.mark.parametrize("how", ["chown", "chmod"])
def test_a_directory_that_was_given_away_makes_no_units(
    tmp_path: Path, given_away: str, path: str, how: str
) -> None:
    (tmp_path / path.lstrip("/")).mkdir(parents=True)
    (tmp_path / "cgroup.procs").touch()
    look = cgroups.only_root_makes("", str(tmp_path))
    assert place_of(path, look) != cgroups.NOWHERE
    if how == "chown":
        os.chown(tmp_path / given_away, 1000, 1000)
    else:
        (tmp_path / given_away).chmod(0o777)
    assert place_of(path, look) == cgroups.NOWHERE


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give directories away")
def test_a_container_inside_a_service_is_believed_when_root_made_it(tmp_path: Path) -> None:
    path = f"/system.slice/web.service/libpod-payload-{ID}"
    (tmp_path / "systemd").mkdir()
    (tmp_path / "systemd/cgroup.procs").touch()
    look = cgroups.only_root_makes("name=systemd", str(tmp_path))
    assert place_of(path, look) == ("web.service", "")
    (tmp_path / "systemd" / path.lstrip("/")).mkdir(parents=True)
    assert place_of(path, look) == ("web.service", "podman:4f1c0d2e9a3b")
    os.chown(tmp_path / "systemd/system.slice/web.service", 1000, -1)
    assert place_of(path, look) == ("web.service", "")


@pytest.mark.parametrize(
    ("raw", "hierarchy", "path"),
    [
        (b"0::/a/b\n", "", b"/a/b"),
        (b"0::/a\x0b\x0c\r\x1c\x1d\x1e\xc2\x85\xe2\x80\xa8b\n", "", None),
        (b"0::/a:b::c\n", "", b"/a:b::c"),
        (b"0::/\xff\n", "", b"/\xff"),
        (b"0::/a (deleted)\n", "", b"/a"),
        (b"2:cpu:/long/er\n1:name=systemd:/x\n0::/\n", "name=systemd", b"/x"),
        (b"2:cpu,cpuacct:/docker/1\n1:pids:/\n", "cpu,cpuacct", b"/docker/1"),
        (b"2:cpu:/x (deleted)\n", "cpu", b"/x (deleted)"),
        (b"nonsense\n0:none\n", "", b""),
        (b"", "", b""),
    ],
)
def test_lines_end_at_newlines_alone_and_have_two_colons(
    raw: bytes, hierarchy: str, path: bytes | None
) -> None:
    expected = raw.removeprefix(b"0::").removesuffix(b"\n") if path is None else path
    assert path_of(raw) == (hierarchy, expected)


@given(st.binary(max_size=200).filter(lambda name: b"\n" not in name))
@example(b"a\x0c0::/system.slice/sshd.service")
@example(b"a\x850::/system.slice/sshd.service")
def test_every_path_that_the_kernel_can_write_comes_back(name: bytes) -> None:
    if name.endswith(b" (deleted)"):
        return
    assert path_of(b"1:name=systemd:/x\n0::/x" + name + b"\n") == ("", b"/x" + name)


@pytest.mark.parametrize("runtime", ["containerd.service", "docker.service"])
def test_a_container_that_its_runtime_moved_on_v1_alone_is_found(runtime: str) -> None:
    """As Docker with the driver cgroupfs, where both versions are mounted."""
    v2 = f"0::/system.slice/{runtime}\n"
    hierarchy, path = path_of(f"9:pids:/docker/{ID}\n1:name=systemd:/docker/{ID}\n{v2}".encode())
    assert hierarchy == "name=systemd"
    assert place_of(os.fsdecode(path)).container == "docker:4f1c0d2e9a3b"
    own = f"/system.slice/{runtime}".encode()
    for v1 in ("", "1:name=systemd:/\n", f"1:name=systemd:/system.slice/{runtime}\n"):
        assert path_of(f"{v1}{v2}".encode())[1] == own
    users = f"{USER}/{runtime}"  # a user can give this name, and stays there
    assert path_of(f"1:name=systemd:/x\n0::{users}\n".encode()) == ("", users.encode())


@settings(max_examples=50)
@given(st.binary(max_size=400))
def test_no_bytes_raise(raw: bytes) -> None:
    hierarchy, path = path_of(raw)
    with tempfile.TemporaryDirectory() as mounts:
        place_of(os.fsdecode(path), cgroups.only_root_makes(hierarchy, mounts))


def test_the_hierarchy_is_looked_at_where_it_is_mounted(tmp_path: Path) -> None:
    ours = os.geteuid() == 0
    for place in ("", "unified", "cpu,cpuacct", "else where"):
        (tmp_path / place / "a").mkdir(mode=0o755, parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    told = tmp_path / "proc/self/mountinfo"
    told.write_text(
        f"30 24 0:26 / {tmp_path}/unified rw,nosuid shared:9 - tmpfs tmpfs rw\n"
        f"31 24 0:27 /below {tmp_path}/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
        f"32 24 0:27 / {tmp_path}/else\\040where rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
        f"33 24 0:28 / {tmp_path}/cpu,cpuacct rw shared:10 - cgroup cgroup rw,cpu,cpuacct\n"
        "nonsense\n"
    )
    mounts, proc = str(tmp_path), str(tmp_path / "proc")
    assert cgroups._mount("", mounts, proc) == f"{tmp_path}/else where"
    assert cgroups._mount("cpu,cpuacct", "/nonexistent", proc) == f"{tmp_path}/cpu,cpuacct"
    assert cgroups._mount("name=systemd", mounts, proc) == ""
    assert cgroups.only_root_makes("name=systemd", mounts, proc)("/a") is None
    assert cgroups.only_root_makes("", mounts, proc)("/a") is ours
    told.unlink()
    assert cgroups.only_root_makes("", mounts, proc)("/a") is None
    (tmp_path / "cgroup.procs").touch()
    assert cgroups._mount("", mounts, proc) == mounts
    (tmp_path / "unified/cgroup.procs").touch()
    assert cgroups._mount("", mounts, proc) == f"{mounts}/unified"


@settings(max_examples=50)
@given(st.binary(max_size=300))
@example(b"1 2 3 / /\\777 o - cgroup2 x rw")
def test_no_mounts_raise(raw: bytes) -> None:
    with tempfile.TemporaryDirectory() as proc:
        Path(proc, "self").mkdir()
        Path(proc, "self/mountinfo").write_bytes(raw)
        for hierarchy in ("", "cpu"):
            cgroups._mount(hierarchy, "/nonexistent", proc)
