# SPDX-License-Identifier: Apache-2.0
"""The benchmark's harness works: every opponent serves, and nothing is left behind.

Not one figure is looked at beyond whether it is there. A benchmark measures;
it does not test.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .waits import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

# It installs a Go compiler and Envoy first: `make test-long`, not `make test`.
pytestmark = pytest.mark.long

_ROOT = Path(__file__).parents[2]
_TOOLS = frozenset({"wrk", "iperf3", "sockperf", "nginx"})
_WITHIN_S = 60.0
_BRIEF = ("--rounds", "1", "--duration", "1", "--warm-up", "0")


def start_bench(*options: str, output: Path) -> subprocess.Popen[str]:
    """Start the harness; `output` also marks the processes that it starts."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.bench", *_BRIEF, *options, "--output", str(output)],
        cwd=_ROOT,
        # Its directory is in the command lines and environments of all that it starts.
        env={**os.environ, "TMPDIR": str(output)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def processes_of(output: Path) -> Iterator[str]:
    """Yield the command lines of the processes that were given this directory."""
    mark = f"TMPDIR={output}".encode()
    for process in Path("/proc").iterdir():
        try:
            is_ours = process.name.isdigit() and mark in (process / "environ").read_bytes()
            if is_ours:
                yield (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended, or is not ours to look into
            continue


def run_bench(*options: str, output: Path) -> dict[str, Any]:
    """Run the harness to its end and return its results."""
    bench = start_bench(*options, output=output)
    try:
        said, _ = bench.communicate(timeout=_WITHIN_S)
    finally:
        bench.terminate()
        bench.wait(timeout=_WITHIN_S)
    if bench.returncode and "is not installed" in said:
        pytest.skip(said.strip().splitlines()[-1])
    assert bench.returncode == 0, said
    assert not list(processes_of(output))
    results: dict[str, Any] = json.loads((output / "benchmarks/results.json").read_text())
    return results


@pytest.mark.usefixtures("kernel_path")
def test_every_opponent_is_measured(tmp_path: Path) -> None:
    """Each opponent serves wrk's requests without an error, and its CPU time is known."""
    results = run_bench("--workloads", "keepalive-100", output=tmp_path)
    if results["omissions"]:
        pytest.skip(
            "; ".join(f"{one['opponent']}: {one['reason']}" for one in results["omissions"])
        )
    measured = {one["opponent"]: one for one in results["measurements"]}
    expected = "none haproxy nginx envoy go sockgw-off sockgw-splice"
    assert list(measured) == expected.split()
    for name, one in measured.items():
        assert one["errors"] == 0, name
        assert one["throughput"] > 0, name
        assert one["spent"]["cpu_s"]["load"] > 0, name
        if name not in {"none", "sockgw-splice"}:
            assert one["spent"]["cpu_s"]["gateway"] > 0, name
        assert set(one["latency_us"]) == {"p50", "p99", "p99.9"}, name


def test_every_tool_is_read(tmp_path: Path) -> None:
    """iperf3's, sockperf's and wrk's outputs become a page with tables and plots."""
    results = run_bench(
        *("--workloads", "keepalive-1,keepalive-100,bulk-1-back,ping-pong"),
        *("--opponents", "haproxy,sockgw-off"),
        output=tmp_path,
    )
    if results["omissions"]:
        pytest.skip(str(results["omissions"]))
    assert results["is_complete"]
    assert all(one["throughput"] > 0 for one in results["measurements"])
    page = (tmp_path / "benchmarks.md").read_text()
    for heading in (
        "What sockgw must reach",
        "One bulk stream to the client",
        "Method",
        "Repeat it",
    ):
        assert heading in page
    for plot in ("throughput", "p99", "cpu"):
        picture = tmp_path / "benchmarks" / f"{plot}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"benchmarks/{plot}.png" in page


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and even SIGKILL end everything that the harness has started."""
    bench = start_bench("--workloads", "bulk-8", "--opponents", "nginx", output=tmp_path)
    try:
        eventually(
            "a load that runs",
            lambda: (
                bench.poll() is not None
                or any("iperf3 -c" in command for command in processes_of(tmp_path))
            ),
        )
        if bench.poll() is None:
            bench.send_signal(number)
        said, _ = bench.communicate(timeout=_WITHIN_S)
    finally:
        bench.kill()
        bench.wait()
    if "is not installed" in said:
        pytest.skip(said.strip())
    eventually("nothing is left", lambda: not list(processes_of(tmp_path)))
    assert "Traceback" not in said
    if number != signal.SIGKILL:
        assert bench.returncode == 130
