# SPDX-License-Identifier: Apache-2.0
"""`sockgw demo`: the first thing that a new user sees."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from .gateways import SOCKGW, clean_environment, run_sockgw
from .waits import eventually

STEPS = ("exchanges", "bulk to the backend", "bulk to the client", "half-close")
WITHOUT_RIGHTS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


def rows(table: str, path: str) -> list[str]:
    """Return the table's lines about a path."""
    return [line for line in table.splitlines() if re.match(rf"{path} .*(equal|DIFFERS)$", line)]


def in_kernel(table: str, path: str) -> list[float]:
    """Return, for each step of a path, the percentage of the bytes that the kernel moved."""
    return [float(re.search(r"([\d.]+)%", row)[1]) for row in rows(table, path)]


def children_of(pid: int) -> set[int]:
    """Return the processes that a process has started and that still run."""
    return {
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    }


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.timeout(100)
def test_every_step_arrives_and_the_kernel_moved_it(kernel_path):
    """Both paths are shown, every digest is equal, and splice moved its bytes in the kernel."""
    done = run_sockgw("demo", within_s=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for path in ("splice", "relay"):
        shown = rows(done.stdout, path)
        assert [step for step in STEPS for row in shown if step in row] == list(STEPS)
        assert all(row.endswith(" equal") for row in shown)
    exchanges, *streams = in_kernel(done.stdout, "splice")
    assert exchanges > 99
    assert min(streams) > 0  # the rest was spilled: nobody promises how much
    assert in_kernel(done.stdout, "relay") == [0, 0, 0, 0]
    assert "bpftool map dump name sock_pair_map" in done.stdout


@pytest.mark.timeout(60)
def test_without_rights_the_relay_is_shown_and_what_root_would_add():
    """A user without capabilities sees the relay work, and how to see splice."""
    done = run_sockgw("demo", prefix=WITHOUT_RIGHTS if os.geteuid() == 0 else (), within_s=45)
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows(done.stdout, "splice") == []
    assert len(rows(done.stdout, "relay")) == len(STEPS)
    assert "run as root, or grant CAP_BPF" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process_behind(number):
    """Ctrl-C or SIGTERM in the middle ends the demo, its backend and its gateway, in one line."""
    with subprocess.Popen(
        [SOCKGW, "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=clean_environment(),
    ) as demo:
        try:
            assert "exchanges" in demo.stdout.readline()
            children = children_of(demo.pid)
            assert len(children) == 2
            demo.send_signal(number)
            _, said = demo.communicate(timeout=20)
        finally:
            demo.kill()
    assert demo.returncode == 1
    assert said == "sockgw: interrupted\n"
    eventually("the end of its children", lambda: not any(map(is_running, children)))
