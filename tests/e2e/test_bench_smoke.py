# SPDX-License-Identifier: Apache-2.0
"""The benchmark's harness works: it measures and reports, and leaves nothing behind.

Not one figure is looked at beyond whether it is there. A benchmark measures;
it does not test.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .waits import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_ROOT = Path(__file__).parents[2]
_WITHIN_S = 100.0
_PICTURE_BYTES = 100_000  # they are committed with every full run
_BRIEF = ("--rounds", "1", "--duration", "1", "--warm-up", "0")


def start_bench(*options: str, output: Path, network: str = "loopback") -> subprocess.Popen[str]:
    """Start the harness; `output` also marks the processes that it starts."""
    options = (*_BRIEF, *options, "--network", network, "--output", str(output))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.bench", *options],
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


def run_bench(*options: str, output: Path, network: str = "loopback") -> dict[str, Any]:
    """Run the harness to its end and return its results."""
    bench = start_bench(*options, output=output, network=network)
    try:
        said, _ = bench.communicate(timeout=_WITHIN_S)
    finally:
        bench.terminate()
        bench.wait(timeout=_WITHIN_S)
    if bench.returncode and "is not installed" in said:
        pytest.skip(said.strip().splitlines()[-1])
    assert bench.returncode == 0, said
    assert not list(processes_of(output))
    saved = output / "benchmarks" / network / "results.json"
    results: dict[str, Any] = json.loads(saved.read_text())
    return results


def measured(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the measurements; skip, which must be earned, where something is not installed."""
    if results["omissions"]:
        pytest.skip(
            "; ".join(f"{one['opponent']}: {one['reason']}" for one in results["omissions"])
        )
    assert results["is_complete"]
    found: list[dict[str, Any]] = results["measurements"]
    return found


def assert_is_whole(one: dict[str, Any]) -> None:
    """Assert that a measurement has every figure, and none that cannot be."""
    what = f"{one['opponent']} under {one['workload']}"
    is_proxy = one["opponent"] != "none"
    cpu_s = one["spent"]["cpu_s"]
    assert one["errors"] == 0, what
    assert one["throughput"] > 0, what
    assert one["operations"] > 0, what
    assert one["spent"]["window_s"] > 0, what
    assert cpu_s["load"] > 0, what
    assert cpu_s["backend"] > 0, what
    # The threads of a path that passes them by may do nothing.
    if is_proxy and one["opponent"] not in {"sockgw-splice", "sockgw-wire", "sockgw-direct"}:
        assert cpu_s["gateway"] > 0, what
    assert (one["resident_bytes"] > 0) is is_proxy, what
    assert bool(one["facts"]) is one["opponent"].startswith("sockgw"), what
    for count in ("gateway_voluntary_switches", "gateway_involuntary_switches"):
        assert one["spent"][count] >= 0, what
    if one["workload"].startswith("bulk"):
        assert not one["latency_us"], what
    else:
        percentiles = ["p50", "p99"]
        if not one["workload"].startswith("redis"):
            percentiles.append("p99.9")
        assert list(one["latency_us"]) == percentiles, what
        latencies = list(one["latency_us"].values())
        assert latencies[0] > 0, what
        assert latencies == sorted(latencies), what


def measure_each(
    workloads: Sequence[str], opponents: Sequence[str], output: Path
) -> dict[str, Any]:
    """Measure each of `opponents` under each of `workloads`; every figure must be there."""
    results = run_bench(
        *("--workloads", ",".join(workloads), "--opponents", ",".join(opponents)), output=output
    )
    found = measured(results)
    assert [(one["workload"], one["opponent"]) for one in found] == [
        (workload, opponent) for workload in workloads for opponent in opponents
    ]
    for one in found:
        assert_is_whole(one)
    return results


def test_a_short_run_reports_everything(tmp_path: Path, splice_verdict: str) -> None:
    """Each measurement has every figure and no error; JSON, page and plots show them."""
    workloads = ("keepalive-1", "keepalive-100", "new-connections", "bulk-1")
    opponents = ("none", "haproxy", "sockgw-off", *(() if splice_verdict else ("sockgw-splice",)))
    results = measure_each(workloads, opponents, tmp_path)
    assert results["machine"]["kernel"] == os.uname().release
    tools = {"wrk", "redis-benchmark", "redis-server", "iperf3", "sockperf", "nginx"}
    assert set(opponents) | tools == set(results["versions"])

    page = (tmp_path / "benchmarks.md").read_text()
    headings = (
        "## Over loopback",
        "### Throughput in one table",
        "### What sockgw must reach",
        "### Where sockgw loses",
        "#### One bulk stream to the backend",
        "## Method",
        "## Repeat it",
    )
    for heading in headings:
        assert f"\n{heading}\n" in page
    for name in ("no proxy", "haproxy", "sockgw off"):
        details = page.partition("## Everything")[2]
        assert details.count(f"\n| {name}") >= len(workloads), name
    assert "nan" not in re.findall(r"\w+", page)
    for plot in ("throughput", "p99", "cpu"):
        picture = (tmp_path / "benchmarks/loopback" / f"{plot}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < _PICTURE_BYTES
        assert f"(benchmarks/loopback/{plot}.png)" in page


def test_messages_are_measured(tmp_path: Path) -> None:
    """sockperf's round trips through the gateway have every figure and no error."""
    (one,) = measured(
        run_bench("--workloads", "ping-pong", "--opponents", "sockgw-off", output=tmp_path)
    )
    assert_is_whole(one)


def test_redis_is_measured(tmp_path: Path, splice_verdict: str) -> None:
    """redis-benchmark's GETs have every figure and no error, and redis-server has counted them."""
    workloads = ("redis-1", "redis-100")
    opponents = ("none", "sockgw-off" if splice_verdict else "sockgw-direct")
    for one in measure_each(workloads, opponents, tmp_path)["measurements"]:
        assert one["is_counted"]
        if one["opponent"] == "sockgw-direct":
            assert one["facts"]['gateway_bytes_total{direction="to_client",path="direct"}'] > 0
    page = (tmp_path / "benchmarks.md").read_text()
    for connections in ("1 connection", "100 connections"):
        assert f"\n#### Redis GETs of 1 KiB, {connections}\n" in page


@pytest.mark.usefixtures("root", "kernel_path")
def test_namespaces_are_measured(tmp_path: Path) -> None:
    """Between namespaces, requests are routed, proxied and translated without an error."""
    opponents = ("none", "haproxy", "sockgw-wire")
    results = run_bench(
        *("--workloads", "keepalive-100", "--opponents", ",".join(opponents)),
        output=tmp_path,
        network="namespaces",
    )
    found = measured(results)
    assert [one["opponent"] for one in found] == list(opponents)
    for one in found:
        assert_is_whole(one)
    assert found[-1]["facts"]['gateway_bytes_total{direction="to_client",path="wire"}'] > 0
    assert "\n## Between network namespaces\n" in (tmp_path / "benchmarks.md").read_text()


# These install a Go compiler and Envoy first, or take long: `make test-long`, not `make test`.
@pytest.mark.long
@pytest.mark.usefixtures("kernel_path")
def test_every_opponent_is_measured(tmp_path: Path) -> None:
    """Each opponent serves wrk's requests without an error, and its CPU time is known."""
    found = measured(run_bench("--workloads", "keepalive-100", output=tmp_path))
    expected = "none haproxy nginx envoy go sockgw-off sockgw-splice sockgw-wire sockgw-direct"
    assert [one["opponent"] for one in found] == expected.split()
    for one in found:
        assert_is_whole(one)


@pytest.mark.long
def test_idle_sessions_are_held(tmp_path: Path) -> None:
    """10,000 sessions are open, up to the backend, beside those that are measured."""
    results = run_bench(
        *("--workloads", "keepalive-100,idle-10000", "--opponents", "none,nginx"), output=tmp_path
    )
    found = measured(results)
    assert len(found) == 4
    for one in found:
        assert_is_whole(one)
    slab = {(one["workload"], one["opponent"]): one["slab_bytes"] for one in found}
    # Two sockets, each of more than 2 KiB, for a session of 10,000.
    assert slab["idle-10000", "nginx"] - slab["keepalive-100", "nginx"] > 2 * 2048 * 10_000
    assert "\n### Beside idle sessions\n" in (tmp_path / "benchmarks.md").read_text()


@pytest.mark.parametrize("network", ["loopback", "namespaces"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, number: signal.Signals, network: str, request: pytest.FixtureRequest
) -> None:
    """Ctrl-C and even SIGKILL end all that the harness has started, and so its namespaces."""
    if network == "namespaces":
        request.getfixturevalue("root")
    bench = start_bench(
        *("--workloads", "bulk-8", "--opponents", "nginx"), output=tmp_path, network=network
    )
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
