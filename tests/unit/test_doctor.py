# SPDX-License-Identifier: MIT
"""packet-hunter doctor, and what start-up says of foreign packages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def environment(tmp_path):
    """Our packages copied to a site directory that another project shares."""
    site = tmp_path / "site"
    for name in ("nlproto", "hunter", "daemon"):
        shutil.copytree(ROOT / "python" / name, site / name)
    return site


def hunter(site, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "hunter", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=ROOT,
        check=False,
    )


def test_doctor_names_each_part_and_what_to_do_next(environment, tmp_path):
    done = hunter(environment, "doctor", "--socket", str(tmp_path / "none.sock"))
    lines = {line.split()[1]: line for line in done.stdout.splitlines()}
    assert list(lines) == ["packages", "module", "probes", "daemon"]
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines["packages"].startswith("ok")
    assert "start it with" in lines["daemon"]


@pytest.mark.parametrize("mark", ["daemon.py", "pidfile.py"])
def test_a_foreign_daemon_installed_over_ours_is_reported(environment, mark):
    (environment / "daemon" / mark).write_text("")
    doctor = hunter(environment, "doctor")
    assert doctor.returncode == 1
    assert f"{environment}/daemon/{mark} is another project's 'daemon'" in doctor.stdout
    assert "of its own" in doctor.stdout


def test_a_foreign_daemon_found_before_ours_is_reported_at_start_up(environment, tmp_path):
    shutil.rmtree(environment / "daemon")
    (environment / "daemon.py").write_text("")
    # A plain module in another directory, found first.
    other = tmp_path / "other"
    other.mkdir()
    (environment / "daemon.py").rename(other / "daemon.py")
    done = subprocess.run(
        [sys.executable, "-m", "hunter", "stats", "--socket", str(tmp_path / "none.sock")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{other}:{environment}"},
        cwd=ROOT,
        check=False,
    )
    assert "is another project's 'daemon'" in done.stderr
    assert done.returncode == 1  # no daemon to ask, told after it
