# SPDX-License-Identifier: MIT
"""Names of containers, from files as the runtimes write them."""

from __future__ import annotations

import json
import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from nlproto.host import cgroups
from nlproto.host.containers import UNKNOWN, Container, ContainerFiles

ID = "4f1c0d2e9a3b" + "5" * 52
OTHER = "4f1c0d2e9a3b" + "6" * 52

CRI = {
    "io.kubernetes.cri.container-name": "app",
    "io.kubernetes.cri.container-type": "container",
    "io.kubernetes.cri.image-name": "registry.example/app:1",
    "io.kubernetes.cri.sandbox-id": "0" * 64,
    "io.kubernetes.cri.sandbox-name": "web-0",
    "io.kubernetes.cri.sandbox-namespace": "default",
}
CRIO = {
    "io.container.manager": "cri-o",
    "io.kubernetes.container.name": "app",
    "io.kubernetes.cri-o.ImageName": "registry.example/app:1",
    "io.kubernetes.pod.name": "web-0",
    "io.kubernetes.pod.namespace": "default",
}
IN_POD = Container("app", "registry.example/app:1", "default/web-0")
DOCKER = {
    "ID": ID,
    "Name": "/web",
    "Image": "sha256:" + "1" * 64,
    "Config": {"Image": "nginx:1.27", "Labels": {"maintainer": "x"}, "Env": ["PATH=/bin"]},
}
STORED = [
    {"id": "9" * 64, "names": ["other"], "metadata": '{"image-name":"other","name":"other"}'},
    {
        "id": ID,
        "names": ["web"],
        "image": "2" * 64,
        "metadata": json.dumps({"image-name": "docker.io/library/nginx:1.27", "name": "web"}),
    },
]
KUBE = f"/kubepods.slice/kubepods-burstable.slice/x.slice/cri-containerd-{ID}.scope"
TASK = "io.containerd.runtime.v2.task"
BUNDLE = "overlay-containers/{}/userdata/config.json"


def put(root: Any, path: Any, content: Any, mode: int = 0o600) -> Any:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    file.chmod(mode)
    return file


def asked(root: Any, cgroup: Any, container: Any = None) -> Any:
    place = cgroups.place_of(cgroup)
    return ContainerFiles(str(root), os.getuid()).find(container or place.container, cgroup)


@pytest.mark.parametrize(
    ("path", "content", "cgroup", "found"),
    [
        (
            f"var/lib/docker/containers/{ID}/config.v2.json",
            DOCKER,
            f"/system.slice/docker-{ID}.scope",
            Container("web", "nginx:1.27"),
        ),
        (
            f"var/lib/docker/containers/{ID}/config.v2.json",
            DOCKER,
            f"/docker/{ID}",
            Container("web", "nginx:1.27"),
        ),
        (
            f"var/lib/docker/containers/{ID}/config.v2.json",
            DOCKER
            | {
                "Name": "/k8s_app_web-0_default_uid_0",
                "Config": {
                    "Image": "registry.example/app:1",
                    "Labels": {name: value for name, value in CRIO.items() if "cri" not in name},
                },
            },
            f"/kubepods/burstable/pod12/{ID}",
            IN_POD,
        ),
        (
            f"run/containerd/{TASK}/k8s.io/{ID}/config.json",
            {"ociVersion": "1.1.0", "annotations": CRI},
            KUBE.replace("x.slice", "kubepods-burstable-pod1_2.slice"),
            IN_POD,
        ),
        (
            f"run/k3s/containerd/{TASK}/k8s.io/{ID}/config.json",
            {"ociVersion": "1.1.0", "annotations": CRI},
            f"/kubepods/besteffort/pod12/{ID}",
            IN_POD,
        ),
        (
            f"run/containerd/{TASK}/default/{ID}/config.json",
            {"ociVersion": "1.1.0", "annotations": {"nerdctl/name": "web"}},
            f"/system.slice/nerdctl-{ID}.scope",
            Container("web"),
        ),
        (
            "run/containers/storage/" + BUNDLE.format(ID),
            {"ociVersion": "1.1.0", "annotations": CRIO},
            f"/kubepods.slice/kubepods-podx.slice/crio-{ID}.scope",
            IN_POD,
        ),
        (
            "var/lib/containers/storage/overlay-containers/containers.json",
            STORED,
            f"/machine.slice/libpod-{ID}.scope/container",
            Container("web", "docker.io/library/nginx:1.27"),
        ),
        (
            "var/lib/containers/storage/vfs-containers/volatile-containers.json",
            STORED,
            f"/machine.slice/libpod-{ID}.scope",
            Container("web", "docker.io/library/nginx:1.27"),
        ),
    ],
)
def test_each_runtime_tells_in_its_own_file(
    path: str, content: Any, cgroup: Any, found: Any, tmp_path: Path
) -> None:
    put(tmp_path, path, content)
    assert asked(tmp_path, cgroup) == found


def test_docker_may_keep_its_containers_elsewhere(tmp_path: Path) -> None:
    put(tmp_path, "etc/docker/daemon.json", {"data-root": "/data/docker"})
    put(tmp_path, f"data/docker/containers/{ID}/config.v2.json", DOCKER)
    assert asked(tmp_path, f"/docker/{ID}").name == "web"


@pytest.mark.parametrize(
    ("cgroup", "name"),
    [
        ("/machine.slice/machine-web\\x2d1.scope", "web-1"),
        ("/machine.slice/systemd-nspawn@web\\x2d1.service", "web-1"),
        ("/lxc.payload.web/system.slice", "web"),
    ],
)
def test_machines_have_no_other_name(cgroup: str, name: str, tmp_path: Path) -> None:
    assert asked(tmp_path, cgroup) == Container(name)


def home() -> Any:
    return pwd.getpwuid(os.getuid()).pw_dir.lstrip("/")


MINE = (
    f"/user.slice/user-{os.getuid()}.slice/user@{os.getuid()}.service/user.slice/libpod-{ID}.scope"
)
STORAGE = ".local/share/containers/storage/overlay-containers/containers.json"


def test_a_users_own_container_cannot_pass_for_another(tmp_path: Path) -> None:
    put(tmp_path, f"{home()}/{STORAGE}", STORED)
    mine = f"user@{os.getuid()}"
    assert asked(tmp_path, MINE) == Container(f"{mine}/web", f"{mine}/docker.io/library/nginx:1.27")


def test_a_users_labels_make_no_pod(tmp_path: Path) -> None:
    path = f"{home()}/.local/share/docker/containers/{ID}/config.v2.json"
    put(tmp_path, path, DOCKER | {"Config": {"Labels": CRIO}})
    assert asked(tmp_path, MINE.replace("libpod", "docker")).pod == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
def test_long_files_cost_their_user_the_names_and_others_little_time(tmp_path: Path) -> None:
    user = pwd.getpwnam("nobody")
    ids = [f"{number:064x}" for number in range(40)]
    stored = [{"id": one, "names": ["web"]} for one in ids]
    for driver in ("overlay", "vfs", "btrfs", "zfs"):
        place = f"{user.pw_dir.lstrip('/')}/{STORAGE}".replace("overlay", driver)
        file = put(tmp_path, place, "[" + "{}," * 300_000 + json.dumps(stored)[1:])
        os.chown(file, user.pw_uid, user.pw_gid)
    files = ContainerFiles(str(tmp_path))
    mine = f"user@{user.pw_uid}"
    cgroup = f"/user.slice/user-{user.pw_uid}.slice/{mine}.service/libpod-{{}}.scope"
    names = [files.find(f"podman:{mine}/{one[:12]}", cgroup.format(one)).name for one in ids]
    assert names[0] == f"{mine}/web"
    assert 1 <= sum(map(bool, names)) < len(ids) // 2


@pytest.mark.parametrize("kind", ["link", "directory link", "fifo"])
def test_a_users_files_are_opened_below_the_home_alone(kind: str, tmp_path: Path) -> None:
    real = put(tmp_path, "elsewhere/containers.json", STORED)
    place = tmp_path / home() / STORAGE
    if kind == "directory link":
        place.parent.parent.mkdir(parents=True)
        place.parent.symlink_to(real.parent)
    else:
        place.parent.mkdir(parents=True)
        place.symlink_to(real) if kind == "link" else os.mkfifo(place)
    assert asked(tmp_path, MINE) == UNKNOWN


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
@pytest.mark.parametrize("path", [f"{home()}/{STORAGE}", f"var/lib/containers/storage/{STORAGE}"])
def test_a_file_of_somebody_else_tells_nothing(path: str, tmp_path: Path) -> None:
    path = path.replace("storage/.local/share/containers/storage", "storage")
    file = put(tmp_path, path, STORED)
    cgroup = MINE if "home" in path or home() in path else f"/machine.slice/libpod-{ID}.scope"
    assert asked(tmp_path, cgroup).name.endswith("web")
    os.chown(file, 12345, 12345)
    assert asked(tmp_path, cgroup) == UNKNOWN


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write_tells_nothing(mode: int, tmp_path: Path) -> None:
    put(tmp_path, f"var/lib/docker/containers/{ID}/config.v2.json", DOCKER, mode)
    assert asked(tmp_path, f"/docker/{ID}") == UNKNOWN


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"Name": 5}',
        '{"Name": "/x", "Config": []}',
        '{"Name": "' + "x" * (4 << 20) + '"}',
        '{"Name": "\\ud800", "Config": null}',
    ],
)
def test_what_is_no_config_tells_nothing(content: str, tmp_path: Path) -> None:
    put(tmp_path, f"var/lib/docker/containers/{ID}/config.v2.json", content)
    assert asked(tmp_path, f"/docker/{ID}").image == ""


def test_names_are_bounded(tmp_path: Path) -> None:
    path = f"var/lib/docker/containers/{ID}/config.v2.json"
    put(tmp_path, path, DOCKER | {"Name": "/" + "x" * 10_000})
    assert len(asked(tmp_path, f"/docker/{ID}").name) <= 4096


@pytest.mark.parametrize("name", ["a/b", "../web-0", "", "a b", "x\n"])
def test_a_pod_is_a_namespace_and_a_name(name: str, tmp_path: Path) -> None:
    labels = CRI | {"io.kubernetes.cri.sandbox-name": name}
    put(tmp_path, f"run/containerd/{TASK}/k8s.io/{ID}/config.json", {"annotations": labels})
    assert asked(tmp_path, f"/kubepods/pod12/{ID}") == Container(*IN_POD[:2])


def test_the_id_is_that_of_the_place_not_of_what_is_made_below(tmp_path: Path) -> None:
    put(tmp_path, f"var/lib/docker/containers/{OTHER}/config.v2.json", DOCKER)
    assert asked(tmp_path, f"/system.slice/docker-{ID}.scope/{OTHER}") == UNKNOWN


def test_a_container_that_is_gone_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    file = put(tmp_path, f"var/lib/docker/containers/{ID}/config.v2.json", DOCKER)
    files = ContainerFiles(str(tmp_path), os.getuid())
    here = ("docker:4f1c0d2e9a3b", f"/docker/{ID}")
    assert files.find(*here).name == "web"
    file.write_text(json.dumps(DOCKER | {"Name": "/renamed"}))
    assert files.find(*here).name == "web"
    now[0] += 100
    assert files.find(*here).name == "renamed"
    file.unlink()
    now[0] += 100
    assert files.find(*here).name == "renamed"
