"""Starting and ending real processes: all of a server's, and no others."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from firebox.matrix.processes import MARKER, Process, belonging, end, look, send
from firebox.matrix.server import Server, free_port, healthy, sweep, wait_for_port
from tests.support.server_process import wait_for

TINY = str(Path(__file__).resolve().parents[2] / "support" / "tiny_server.py")


def server(tmp_path: Path, *behaviours: str) -> Server:
    argv = ["{python}", TINY, "{port}", *behaviours]
    return Server(
        argv, {"HERE": "{port}"}, port=free_port(), log=tmp_path / "log", marker=secrets.token_hex(8)
    )


def test_health_and_end(tmp_path):
    found = server(tmp_path)
    assert found.wait_until_healthy("/health", 10)
    assert "ready" in found.log.read_text()
    assert found.stop(5) == []
    assert found.exit_code == -signal.SIGTERM
    assert not healthy(found.port, "/health")


@pytest.mark.parametrize(
    ("behaviours", "members"),
    [(["deaf"], 1), (["child"], 2), (["detached"], 2), (["deaf", "child", "detached"], 3)],
)
def test_every_process_is_ended_whatever_it_does(tmp_path, behaviours, members):
    found = server(tmp_path, *behaviours)
    assert found.wait_until_healthy("/health", 10)
    wait_for(lambda: len(belonging(found.marker)) == members)
    assert found.stop(0.3) == []
    assert belonging(found.marker, found.root) == []
    assert wait_for_port(found.port)


def test_workers_that_outlive_the_server_are_found(tmp_path):
    found = server(tmp_path, "child", "detached", "orphans")
    assert not found.wait_until_healthy("/health", 10)
    assert found.exit_code == 4
    wait_for(lambda: len(belonging(found.marker, found.root)) == 2)
    found.stop(0.2)
    assert belonging(found.marker) == []


def test_a_server_that_never_gets_healthy_is_given_up_after_the_limit(tmp_path):
    found = server(tmp_path, "sick")
    began = time.monotonic()
    assert not found.wait_until_healthy("/health", 0.8)
    assert 0.8 <= time.monotonic() - began < 10
    assert found.alive()
    found.stop(5)


def test_one_that_ends_is_not_waited_for(tmp_path):
    found = server(tmp_path, "exits")
    began = time.monotonic()
    assert not found.wait_until_healthy("/health", 30)
    assert time.monotonic() - began < 10
    assert found.exit_code == 3
    found.stop(1)


def test_a_marker_with_no_store_is_enough_to_end_what_was_left(tmp_path):
    """The runner was killed before it could write the process down."""
    found = server(tmp_path, "child", "detached")
    assert found.wait_until_healthy("/health", 10)
    wait_for(lambda: len(belonging(found.marker)) >= 3)
    assert sweep(found.marker, None, 0.2) >= 2  # three, or two while the detached one changes parents
    assert belonging(found.marker) == []
    found.wait_for_exit(5)
    assert sweep(found.marker, found.root, 0.2) == 0


def test_strangers_are_left_alone(tmp_path):
    """Neither a process with another marker, nor the one that has a recorded pid now."""
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    ) as stranger:
        now = look(stranger.pid)
        before = Process(stranger.pid, now.started - 100)  # the same pid, in an earlier life
        assert belonging("marker-of-nobody", before) == []
        assert sweep("marker-of-nobody", before, 0.1) == 0
        send([before], signal.SIGKILL)
        time.sleep(0.1)
        assert stranger.poll() is None
        stranger.kill()


def ignores_sigterm(process):
    status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    (ignored,) = (line.split()[1] for line in status if line.startswith("SigIgn"))
    return bool(int(ignored, 16) >> signal.SIGTERM - 1 & 1)


def test_a_process_that_lost_its_marker_is_found_by_its_parent(tmp_path):
    run = f"subprocess.run([sys.executable, {TINY!r}, '0', 'deaf'], env={{}}, start_new_session=True)"
    code = f"import subprocess, sys; {run}"
    found = Server(
        ["{python}", "-c", code, "{port}"],
        {},
        port=free_port(),
        log=tmp_path / "log",
        marker=secrets.token_hex(8),
    )
    wait_for(lambda: len(belonging(found.marker, found.root)) == 2)
    both = belonging(found.marker, found.root)
    wait_for(lambda: any(map(ignores_sigterm, both)))
    assert found.stop(0.2) == []
    assert belonging(found.marker, found.root) == []
    assert [each for each in both if look(each.pid) == each] == [], "a child is left"


def test_the_runner_itself_is_never_among_them(monkeypatch):
    monkeypatch.setenv(MARKER, "mine")
    code = f"from firebox.matrix.processes import belonging; print(belonging({'mine'!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_will_not_die_is_reported():
    immortal = [Process(os.getpid(), 1)]  # not this process: it did not start with the machine
    assert end(lambda: immortal, grace_s=0.05, kill_s=0.05) == immortal
