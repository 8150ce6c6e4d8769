# SPDX-License-Identifier: Apache-2.0
"""What a user sees of a running gateway: log lines, metrics, bpftool, SOCKGW_* variables."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import pytest

from . import kernel
from .gateways import Metrics
from .paths import in_kernel, spliced, with_processes
from .peers import Backend, connect, is_reset, join_address, split_address
from .traffic import KIB, MIB, Stream, Task, exchange, expect, receive, send_and_finish
from .waits import eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from .conftest import OpenSession, StartGateway
    from .gateways import AccessLine, Gateway
    from .paths import PathUnderTest
    from .peers import EchoServer

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
ENDS = (
    *("eof", "client_reset", "backend_reset", "idle_timeout", "drain_timeout", "closed"),
    *("dial_failed", "error"),
)


# --- the log ---------------------------------------------------------------


def _use(client: socket.socket, server: socket.socket, up: Stream, down: Stream) -> None:
    tasks = [Task(send_and_finish, client, up), Task(send_and_finish, server, down)]
    at_server = Task(receive, server)
    assert receive(client) == down.receipt()
    assert at_server.result() == up.receipt()
    for task in tasks:
        task.result()


@with_processes
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_access_log(
    gateway: StartGateway,
    path: PathUnderTest,
    backend: Backend,
    session: OpenSession,
    log_format: str,
) -> None:
    """Each session's end is one line: who, where to, how long, how many bytes which way, why."""
    running = gateway(backend.address, log_format=log_format)
    clients = []
    for number, (up, down) in enumerate([(0, 0), (1, 0), (0, 1), (3 * MIB, 5), (7, 3 * MIB)]):
        client, server = session(running, backend)
        clients.append(join_address(*client.getsockname()))
        if up and down:
            for _ in range(path.exchanges):
                exchange(client, server)
            running.await_sessions(1, path=path.label)
        _use(client, server, Stream(2 * number, up), Stream(2 * number + 1, down))
        client.close()
        server.close()
        line = running.access_lines(number + 1)[number]
        extra = 4 * path.exchanges if up and down else 0
        _assert_line(line, running, backend)
        assert line["client"] == clients[-1]
        assert line["end"] == "eof"
        assert line.bytes("to_backend") == up + extra
        assert line.bytes("to_client") == down + extra
        if up and down:
            assert line["path"] == path.label
            assert (line.bytes("to_backend", "splice") > 0) == path.is_spliced
            assert line.bytes("to_backend", path.label) > 0
        if not path.is_spliced:
            assert line.bytes("to_backend", "splice") == line.bytes("to_client", "splice") == 0
        # The kernel's own figures need the program that follows our sockets.
        assert ("client_rtt_us" in line.fields) == (path.accel != "off")
    assert len(running.access_lines()) == len(clients)


def _assert_line(line: AccessLine, running: Gateway, backend: Backend) -> None:
    """Fail unless the fields of `line` are there and make sense."""
    assert line["listener"] == running.address
    assert line["backend"] == backend.address
    assert 0 <= float(line["seconds"]) < 30
    assert int(line["spills"]) >= 0
    assert line["end"] in ENDS
    for name in ("client_rtt_us", "client_retransmits", "backend_rtt_us", "backend_retransmits"):
        if name in line.fields:
            assert int(line[name]) >= 0


def test_text_log_lines(gateway: StartGateway, backend: Backend, session: OpenSession) -> None:
    """Each line of the text log has a UTC time, a level and a message."""
    running = gateway(backend.address)
    client, server = session(running, backend)
    _use(client, server, Stream(1, 10), Stream(2, 10))
    running.access_lines(1)
    assert running.stop() == 0
    for line in running.lines:
        time, level, message = line.split(" ", 2)
        assert TIMESTAMP.fullmatch(time)
        assert level in {"INFO", "WARNING"}
        assert message


def test_json_log_lines(gateway: StartGateway, backend: Backend, session: OpenSession) -> None:
    """Each line of the JSON log is an object with a UTC time, a level and a message."""
    running = gateway(backend.address, log_format="json")
    client, server = session(running, backend)
    _use(client, server, Stream(1, 10), Stream(2, 10))
    running.access_lines(1)
    assert running.stop() == 0
    records = [json.loads(line) for line in running.lines]
    for record in records:
        assert TIMESTAMP.fullmatch(record["time"])
        at = datetime.fromisoformat(record["time"].replace("Z", "+00:00"))
        assert abs((datetime.now(timezone.utc) - at).total_seconds()) < 60
        assert record["level"] in {"INFO", "WARNING"}
        assert record["message"]
    line = next(record for record in records if record["message"] == "session")
    assert isinstance(line["seconds"], float)
    assert isinstance(line["to_backend_relay_bytes"], int)


def test_access_log_of_many_sessions_at_once(gateway: StartGateway, echo: EchoServer) -> None:
    """Lines of sessions that end at the same moment are not mixed up."""
    running = gateway(echo.address, threads=4)

    def visit(number: int) -> str:
        client = connect(running.address)
        name = join_address(*client.getsockname())
        client.sendall(b"x" * number)
        expect(client, b"x" * number)
        client.close()
        return name

    with ThreadPoolExecutor(16) as pool:
        expected = dict(zip(pool.map(visit, range(1, 201)), range(1, 201), strict=True))
    lines = running.access_lines(200)
    assert {line["client"]: line.bytes("to_backend") for line in lines} == expected
    assert {line["client"]: line.bytes("to_client") for line in lines} == expected


# --- metrics ---------------------------------------------------------------


@with_processes
def test_metrics_at_the_start(gateway: StartGateway, path: PathUnderTest, echo: EchoServer) -> None:
    """Every metric and every known label value is there, at 0, before the first session."""
    running = gateway(echo.address)
    metrics = running.metrics()
    for status in ("success", "fallback"):
        assert metrics.value("gateway_ebpf_redirects_total", status=status) == 0
    assert metrics.value("gateway_ebpf_active_pairs") == 0
    for label in ("direct", "splice", "relay"):
        assert metrics.value("gateway_sessions_active", path=label) == 0
        assert metrics.value("gateway_sessions_total", path=label) == 0
        for direction in ("to_backend", "to_client"):
            assert metrics.value("gateway_bytes_total", direction=direction, path=label) == 0
    for end in ENDS:
        assert metrics.value("gateway_sessions_ended_total", end=end) == 0
    for reason in ("refused", "timeout", "unreachable"):
        assert metrics.value("gateway_dial_errors_total", reason=reason) == 0
    for direction in ("to_backend", "to_client"):
        assert metrics.value("gateway_spills_total", direction=direction) == 0
    for reason in (
        *("kernel_too_old", "no_btf", "missing_capability", "no_cgroup2", "load_failed"),
        *("attach_failed", "not_established", "busy", "invalid_socket", "no_room"),
    ):
        assert metrics.value("gateway_fallbacks_total", reason=reason) == 0
    assert metrics.value("gateway_flush_seconds_count") == 0
    assert metrics.value("gateway_kernel_held_bytes") == 0
    assert metrics.value("gateway_sessions_max") > 0
    built = metrics.value("gateway_build_info", accel=path.accel, path=path.label)
    assert built == 1
    info = next(
        sample.labels
        for family in metrics.families
        for sample in family.samples
        if sample.name == "gateway_build_info"
    )
    assert info["kernel"]
    assert info["version"]
    assert "libbpf" in info


@with_processes
def test_metrics_follow_the_sessions(
    gateway: StartGateway, path: PathUnderTest, backend: Backend, session: OpenSession
) -> None:
    """Sessions, pairs, bytes and ends are counted as they happen."""
    running = gateway(backend.address)
    pairs = [session(running, backend) for _ in range(3)]
    for client, server in pairs * path.exchanges:
        exchange(client, server)
    running.await_sessions(3, path=path.label)
    metrics = running.metrics()
    assert metrics.value("gateway_sessions_active") == 3
    assert metrics.value("gateway_ebpf_active_pairs") == (3 if path.in_kernel else 0)
    before = metrics.value("gateway_bytes_total")
    for client, server in pairs:
        exchange(client, server, b"x" * 1000)
    metrics = running.metrics()
    assert metrics.value("gateway_bytes_total") - before == 6000
    assert metrics.value("gateway_bytes_total", path=path.label) >= 6000
    for client, server in pairs:
        _use(client, server, Stream(1, 100 * KIB), Stream(2, 100 * KIB))
        client.close()
        server.close()
    running.await_sessions(0)
    eventually(
        "three sessions ended",
        lambda: running.metrics().value("gateway_sessions_ended_total", end="eof") == 3,
    )
    metrics = running.metrics()
    assert metrics.value("gateway_sessions_total", path=path.label) == 3
    assert metrics.value("gateway_ebpf_active_pairs") == 0
    total = 3 * (4 * path.exchanges + 1000 + 100 * KIB)
    for direction in ("to_backend", "to_client"):
        assert metrics.value("gateway_bytes_total", direction=direction) == total
        by_lines = sum(line.bytes(direction) for line in running.access_lines(3))
        assert by_lines == total
    if path.in_kernel:
        assert metrics.value("gateway_flush_seconds_count") >= 1
        buckets = metrics.samples("gateway_flush_seconds_bucket")
        assert buckets == sorted(buckets)
        assert buckets[-1] == metrics.value("gateway_flush_seconds_count")


@in_kernel
def test_bytes_are_counted_while_they_flow(
    gateway: StartGateway, path: PathUnderTest, backend: Backend, session: OpenSession
) -> None:
    """A scrape in the middle of a session sees the bytes that the kernel moved so far."""
    running = gateway(backend.address)
    client, server = session(running, backend)
    exchange(client, server)
    running.await_sessions(1, path=path.label)
    before = running.metrics()
    for _ in range(100):
        exchange(client, server, b"y" * 500)
    after = running.metrics()
    for direction in ("to_backend", "to_client"):
        labels = {"direction": direction, "path": path.label}
        moved = after.value("gateway_bytes_total", **labels)
        assert moved - before.value("gateway_bytes_total", **labels) == 50_000
    success = after.value("gateway_ebpf_redirects_total", status="success")
    assert success - before.value("gateway_ebpf_redirects_total", status="success") >= 200
    assert after.value("gateway_bytes_total", path="relay") == before.value(
        "gateway_bytes_total", path="relay"
    )


_UNITS = re.compile(r"_(ms|us|ns|millis|milliseconds|microseconds|minutes|kb|mb|kib|mib|bits)(_|$)")


def _lint_names(name: str, kind: str) -> Iterator[str]:
    """Say what is wrong with the name of a metric of some kind."""
    if kind in {"unknown", "untyped"}:
        yield "no type"
    if kind != "counter" and name.endswith("_total"):
        yield "not a counter, and ends in _total"
    if kind in {"gauge", "info"} and name.endswith(("_count", "_sum", "_bucket")):
        yield "looks like part of a histogram"
    if _UNITS.search(name):
        yield "not in base units"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        yield "not snake_case"
    if re.search(r"(counter|gauge|histogram|summary)", name):
        yield "has its type in its name"


def _lint_samples(metrics: Metrics) -> Iterator[str]:
    """Say what is wrong with the samples."""
    seen = set()
    for family in metrics.families:
        for sample in family.samples:
            if family.type == "counter" and not sample.name.endswith(("_total", "_created")):
                yield f"{sample.name}: a counter that does not end in _total"
            identity = (sample.name, frozenset(sample.labels.items()))
            if identity in seen:
                yield f"{identity}: twice"
            seen.add(identity)
            for label in sample.labels:
                if not re.fullmatch(r"[a-z][a-z0-9_]*", label):
                    yield f"{sample.name}: label {label}"


def _lint(metrics: Metrics) -> list[str]:
    """Return what `promtool check metrics` would say, and duplicates."""
    problems = list(_lint_samples(metrics))
    helped = re.findall(r"^# HELP (\S+) (.*)$", metrics.text, re.MULTILINE)
    typed = re.findall(r"^# TYPE (\S+) (\S+)$", metrics.text, re.MULTILINE)
    for kind, names in (("HELP", helped), ("TYPE", typed)):
        listed = [name for name, _ in names]
        problems += [f"{name}: two {kind} lines" for name in listed if listed.count(name) > 1]
    explained = {name for name, text in helped if text.strip()}
    for family in metrics.families:
        name = family.name + ("_total" if family.type == "counter" else "")
        if name not in explained:
            problems.append(f"{name}: no help text")
        problems += [f"{name}: {problem}" for problem in _lint_names(name, family.type)]
    return problems


def test_metrics_lint(gateway: StartGateway, backend: Backend, session: OpenSession) -> None:
    """The metrics parse, and pass the rules of `promtool check metrics`."""
    running = gateway(backend.address)
    client, server = session(running, backend)
    _use(client, server, Stream(1, 100), Stream(2, 100))
    running.access_lines(1)
    metrics = running.metrics()
    assert _lint(metrics) == []
    own = [family for family in metrics.families if family.name.startswith("gateway_")]
    assert len(own) >= 12
    # Nothing that grows with the number of clients.
    assert len(metrics.text.splitlines()) < 300
    assert join_address(*client.getsockname()) not in metrics.text
    others = {
        family.name.split("_")[0]
        for family in metrics.families
        if not family.name.startswith("gateway_")
    }
    assert others <= {"process", "python"}


def test_lint_finds_what_it_should() -> None:
    """The lint of this suite rejects bad metrics (or it would prove nothing)."""
    bad = Metrics(
        "# TYPE gateway_a_ms gauge\ngateway_a_ms 1\n"
        "# HELP gateway_b_total Help.\n# TYPE gateway_b_total gauge\ngateway_b_total 1\n"
    )
    problems = "\n".join(_lint(bad))
    for found in ("no help text", "not in base units", "not a counter"):
        assert found in problems


@with_processes
def test_metrics_under_load(gateway: StartGateway, echo: EchoServer) -> None:
    """Many scrapes at once, in the middle of traffic, are all answered."""
    running = gateway(echo.address)
    clients = [connect(running.address) for _ in range(20)]
    with ThreadPoolExecutor(24) as pool:
        scrapes = [pool.submit(running.metrics) for _ in range(50)]
        for _ in range(50):
            for client in clients:
                client.sendall(b"hello")
            for client in clients:
                expect(client, b"hello")
        for scrape in scrapes:
            assert scrape.result(30).value("gateway_sessions_active") <= 20
    for client in clients:
        client.close()


def test_metrics_server_ignores_nonsense(gateway: StartGateway, echo: EchoServer) -> None:
    """Other paths are 404 or the metrics, and a client that says nothing blocks no scrape."""
    running = gateway(echo.address)
    address = running.metrics_url.split("/")[2]
    silent = connect(address)
    rude = connect(address)
    rude.sendall(b"\0\1\2 nonsense\r\n\r\n")
    connection = http.client.HTTPConnection(address, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/other")
        assert connection.getresponse().status in {200, 404}
    assert running.metrics().value("gateway_sessions_active") == 0
    silent.close()
    rude.close()


def test_metrics_off(gateway: StartGateway, echo: EchoServer) -> None:
    """--metrics off listens on one port only."""
    running = gateway(echo.address, metrics="off")
    assert not running.has_metrics
    listening = subprocess.run(
        ["ss", "-tlnpH"], capture_output=True, text=True, check=True, timeout=20
    ).stdout
    own = [line for line in listening.splitlines() if f"pid={running.pid}," in line]
    assert len(own) == 1
    client = connect(running.address)
    client.sendall(b"hello")
    expect(client, b"hello")
    client.close()
    running.access_lines(1)


# --- bpftool ---------------------------------------------------------------


def _bpftool_text(*arguments: str) -> str:
    return subprocess.run(
        ["bpftool", *arguments], capture_output=True, text=True, check=True, timeout=20
    ).stdout


@spliced
def test_inspection_with_bpftool(
    gateway: StartGateway, path: PathUnderTest, backend: Backend, session: OpenSession
) -> None:
    """The bpftool commands of the README show program, maps, pair, sockets and attachment."""
    running = gateway(backend.address)
    client, server = session(running, backend)
    exchange(client, server)
    running.await_sessions(1, path=path.label)
    ours = _cookies_of_session(running, client, server)

    programs = [line for line in _bpftool_text("prog", "list").splitlines() if "sock" in line]
    assert any("sk_skb" in line and "sock_stream_ver" in line for line in programs)
    assert any("sock_ops" in line for line in programs)
    listed = [line for line in _bpftool_text("map", "list").splitlines() if "sock_map" in line]
    assert any("sockhash" in line for line in listed)
    assert "sock_pair_map" in _bpftool_text("map", "list")

    maps = running.maps()
    for name in ("sock_map", "sock_pair_map"):
        dump = kernel.bpftool("map", "dump", "id", maps[name])
        assert kernel.cookies_of(dump) == ours, name
        assert "key" in _bpftool_text("map", "dump", "name", name)

    mount = kernel.cgroup2_mounts()[0]
    attached = {program["id"] for program in kernel.bpftool("cgroup", "list", mount)}
    attached &= running.process.bpf_ids()["prog"]
    assert len(attached) == 1

    client.close()
    server.close()
    running.await_sessions(0)
    for name in ("sock_map", "sock_pair_map"):
        eventually(f"{name} empty", lambda name=name: kernel.map_entries(maps[name]) == 0)  # type: ignore[misc]


def _cookies_of_session(running: Gateway, client: socket.socket, server: socket.socket) -> set[int]:
    """Return the cookies of the gateway's two sockets, as `ss` shows them."""
    port = split_address(running.address)[1]
    ends = {
        (running.address, join_address(*client.getsockname())),
        (join_address(*server.getpeername()), join_address(*server.getsockname())),
    }
    found = kernel.tcp_sockets(
        *("sport", "=", f":{port}", "or", "dport", "=", f":{server.getsockname()[1]}")
    )
    cookies = {socket_.cookie for socket_ in found if (socket_.local, socket_.peer) in ends}
    assert len(cookies) == 2
    return cookies


def test_off_touches_no_bpf(start: StartGateway, echo: EchoServer) -> None:
    """With --accel off nothing is loaded into the kernel."""
    running = start(echo.address, accel="off")
    held = running.process.bpf_ids()
    assert not any(held.values())


# --- variables -------------------------------------------------------------


def test_every_option_as_a_variable(start: StartGateway, echo: EchoServer) -> None:
    """Every option may be given as a SOCKGW_* variable instead."""
    running = start(
        listen=None,
        metrics=None,
        environment={
            "SOCKGW_LISTEN": "127.0.0.1:0",
            "SOCKGW_BACKEND": echo.address,
            "SOCKGW_METRICS": "127.0.0.1:0",
            "SOCKGW_ACCEL": "off",
            "SOCKGW_MAX_CONNECTIONS": "7",
            "SOCKGW_IDLE_TIMEOUT": "1",
            "SOCKGW_CONNECT_TIMEOUT": "2",
            "SOCKGW_DRAIN_TIMEOUT": "1",
            "SOCKGW_LOG_FORMAT": "json",
        },
    )
    assert running.path == "relay"
    assert all(json.loads(line)["message"] for line in running.lines)
    assert running.metrics().value("gateway_sessions_max") == 7
    client = connect(running.address)
    client.sendall(b"hello")
    expect(client, b"hello")
    assert is_reset(client, within_s=3.0)
    assert running.access_lines(1)[0]["end"] == "idle_timeout"


def test_two_backends_in_one_variable(start: StartGateway) -> None:
    """SOCKGW_BACKEND may name several backends, with spaces between them."""
    with Backend() as one, Backend() as two:
        running = start(
            accel="off", threads=1, environment={"SOCKGW_BACKEND": f"{one.address} {two.address}"}
        )
        for backend in (one, two):
            client = connect(running.address)
            eventually("a dial", lambda: one.has_connection() or two.has_connection())
            used = one if one.has_connection() else two
            server = used.accept()
            exchange(client, server)
            client.close()
            server.close()
            del backend
        assert {line["backend"] for line in running.access_lines(2)} == {one.address, two.address}


def test_command_line_beats_variable(start: StartGateway, echo: EchoServer) -> None:
    """An option on the command line counts more than its variable."""
    running = start(
        echo.address,
        accel="off",
        threads=1,
        environment={
            "SOCKGW_ACCEL": "turbo",
            "SOCKGW_THREADS": "none",
            "SOCKGW_METRICS": "off",
            "SOCKGW_BACKEND": "127.0.0.1:9",
        },
    )
    assert running.path == "relay"
    assert running.has_metrics
    client = connect(running.address)
    client.sendall(b"hello")
    expect(client, b"hello")
    client.close()


@pytest.mark.parametrize("how", ["option", "variable"])
def test_threads(start: StartGateway, echo: EchoServer, how: str) -> None:
    """--threads is the number of worker threads."""

    def threads(count: int) -> int:
        if how == "option":
            running = start(echo.address, accel="off", threads=count)
        else:
            variable = {"SOCKGW_THREADS": str(count)}
            running = start(echo.address, accel="off", environment=variable)
        return running.process.threads()

    assert threads(5) - threads(1) == 4
