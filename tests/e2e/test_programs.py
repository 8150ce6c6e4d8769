# SPDX-License-Identifier: Apache-2.0
"""Real clients and servers, unmodified, with the gateway between them.

The servers are Debian's packages, installed if they are missing; the WebSocket
server is PyPI's `websockets`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import random
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from websockets.sync.client import connect as websocket_connect
from websockets.sync.server import serve as websocket_serve

from .peers import is_silent, join_address, split_address
from .programs import nginx, postgresql, redis, require
from .traffic import MIB, Stream, Task, exchange

if TYPE_CHECKING:
    from collections.abc import Iterator

    from websockets.sync.client import ClientConnection
    from websockets.sync.server import ServerConnection

    from .conftest import OpenSession, StartGateway
    from .gateways import Gateway
    from .paths import PathUnderTest
    from .peers import Backend

_PROGRAM_S = 60
SMALL = Stream(1, 1024)
LARGE = Stream(2, 100 * MIB)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run nginx with a small and a large file; give its address."""
    directory = tmp_path_factory.mktemp("nginx")
    files = directory / "www"
    files.mkdir()
    for name, stream in (("small", SMALL), ("large", LARGE)):
        with (files / name).open("wb") as file:
            for offset in range(0, stream.length, MIB):
                file.write(stream.read(offset, MIB))
    with nginx(directory) as address:
        yield address


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run redis-server; give its address."""
    with redis(tmp_path_factory.mktemp("redis")) as address:
        yield address


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """Run PostgreSQL; give its address.

    Its directory lies in /tmp itself, where the user that it demands may go.
    """
    directory = Path(tempfile.mkdtemp(prefix="sockgw-postgresql-"))
    try:
        with postgresql(directory) as address:
            yield address
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_PROGRAM_S,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def _curl(*arguments: str) -> bytes:
    command = [require("curl"), "--silent", "--show-error", "--fail", "--noproxy", "*", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=_PROGRAM_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _assert_moved(
    running: Gateway, path: PathUnderTest, at_least_bytes: int, *, goes_direct: bool = True
) -> None:
    """Fail unless that much went to clients, and some of it on the path under test.

    One request and its answer are over before a session is direct, and who waits in
    recv() is left to TCP.
    """
    metrics = running.metrics()
    total = metrics.value("gateway_bytes_total", direction="to_client")
    assert total >= at_least_bytes
    if path.is_spliced or (path.in_kernel and goes_direct):
        assert metrics.value("gateway_bytes_total", path=path.label) > 0
        assert metrics.value("gateway_ebpf_redirects_total", status="success") > 0


@pytest.mark.parametrize(("name", "stream"), [("small", SMALL), ("large", LARGE)])
def test_curl_from_nginx(
    gateway: StartGateway, path: PathUnderTest, web: str, name: str, stream: Stream
) -> None:
    """curl fetches 1 KiB and 100 MB from nginx, byte for byte."""
    running = gateway(web)
    for _ in range(3 if name == "small" else 1):
        body = _curl(f"http://{running.address}/{name}")
        assert len(body) == stream.length
        assert hashlib.sha256(body).hexdigest() == stream.receipt().sha256
    _assert_moved(running, path, stream.length, goes_direct=False)


def test_curl_keep_alive(gateway: StartGateway, web: str, tmp_path: Path) -> None:
    """A hundred requests of one curl share one session."""
    running = gateway(web)
    output = tmp_path / "body"
    url = f"http://{running.address}/small"
    words = [word for _ in range(100) for word in ("-o", str(output), url)]
    answers = _curl("-w", "%{http_code} %{num_connects}\n", *words).decode().split("\n")[:-1]
    assert len(answers) == 100
    assert {answer.split()[0] for answer in answers} == {"200"}
    assert sum(int(answer.split()[1]) for answer in answers) == 1
    assert output.read_bytes() == SMALL.all()
    assert len(running.access_lines(1)) == 1


def test_curl_in_parallel(gateway: StartGateway, web: str, tmp_path: Path) -> None:
    """Eight downloads at once each arrive whole, large and small ones mixed."""
    running = gateway(web)
    command = ["--parallel", "--parallel-immediate", "--parallel-max", "8"]
    names = ["large"] + ["small"] * 40 + ["large"]
    for number, name in enumerate(names):
        command += ["-o", str(tmp_path / str(number)), f"http://{running.address}/{name}"]
    _curl(*command)
    expected = {"small": SMALL.receipt().sha256, "large": LARGE.receipt().sha256}
    for number, name in enumerate(names):
        body = tmp_path / str(number)
        assert hashlib.sha256(body.read_bytes()).hexdigest() == expected[name]
        body.unlink()


def test_curl_gives_up_early(gateway: StartGateway, web: str) -> None:
    """A client that stops in the middle of a download leaves nothing behind."""
    running = gateway(web)
    command = [require("curl"), "-sS", "--noproxy", "*", "--max-filesize", "1000"]
    for _ in range(5):
        done = subprocess.run(
            [*command, f"http://{running.address}/large"],
            capture_output=True,
            timeout=_PROGRAM_S,
            check=False,
        )
        assert done.returncode != 0
    running.await_sessions(0)


def _echo_messages(connection: ServerConnection) -> None:
    for message in connection:
        connection.send(message)


def _send_messages(client: ClientConnection, messages: list[str | bytes]) -> None:
    for message in messages:
        client.send(message)


def test_websocket_echo(gateway: StartGateway, path: PathUnderTest) -> None:
    """A WebSocket conversation, text and binary, 0 bytes to 1 MiB, is echoed message by message."""
    rng = random.Random(7)
    messages: list[str | bytes] = ["", "hello", b"", "\N{SNOWMAN}" * 1000, Stream(1, MIB).all()]
    messages += [rng.randbytes(rng.randint(1, 5000)) for _ in range(200)]
    with websocket_serve(_echo_messages, "127.0.0.1", 0, max_size=None, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever, name="e2e-websocket")
        thread.start()
        try:
            running = gateway(join_address(*server.socket.getsockname()))
            url = f"ws://{running.address}/"
            with websocket_connect(url, max_size=None, compression=None, proxy=None) as client:
                for message in messages:
                    client.send(message)
                    assert client.recv(timeout=10) == message
                # And pipelined.
                sending = Task(_send_messages, client, messages)
                assert [client.recv(timeout=10) for _ in messages] == messages
                sending.result()
            _assert_moved(running, path, 2 * MIB, goes_direct=False)
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("pipeline", [1, 16])
def test_redis_benchmark(
    gateway: StartGateway, path: PathUnderTest, cache: str, pipeline: int
) -> None:
    """redis-benchmark runs its commands on 50 connections, alone and pipelined."""
    running = gateway(cache)
    host, port = split_address(running.address)
    command = [require("redis-benchmark"), "-h", host, "-p", str(port), "--csv"]
    command += ["-n", "8000", "-c", "50", "-P", str(pipeline), "-d", "300", "-r", "1000"]
    command += ["-t", "ping_mbulk,set,get,incr,lpush,lrange_100"]
    rows = list(csv.DictReader(io.StringIO(_run(command))))
    tests = {row["test"].split()[0] for row in rows}
    assert {"PING_MBULK", "SET", "GET", "INCR", "LPUSH", "LRANGE_100"} <= tests
    assert all(float(row["rps"]) > 1000 for row in rows), rows
    _assert_moved(running, path, 8_000)


def test_pgbench(gateway: StartGateway, path: PathUnderTest, database: str) -> None:
    """pgbench fills a PostgreSQL database and runs transactions on it, none of which fails."""
    running = gateway(database)
    host, port = split_address(running.address)
    pgbench = [require("pgbench"), "-h", host, "-p", str(port), "-U", "postgres"]
    _run([*pgbench, "-i", "-q", "-s", "2", "postgres"], PGCONNECT_TIMEOUT="10")
    out = _run([*pgbench, "-c", "8", "-j", "2", "-t", "150", "postgres"], PGCONNECT_TIMEOUT="10")
    assert "number of transactions actually processed: 1200/1200" in out
    assert re.search(r"number of failed transactions: 0\b", out)
    # And a new connection for each transaction.
    out = _run([*pgbench, "-C", "-S", "-c", "4", "-t", "25", "postgres"], PGCONNECT_TIMEOUT="10")
    assert "number of transactions actually processed: 100/100" in out
    _assert_moved(running, path, 100_000)


def test_idle_terminal_session(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """An ssh-like session, a keep-alive message each second, outlives --idle-timeout 2."""
    running = gateway(backend.address, idle_timeout=2)
    client, server = session(running, backend)
    for _ in range(4):
        assert is_silent(client, 1.0)
        exchange(client, server, b"\0\0\0\x0ckeepalive@openssh.com")
    client.sendall(b"exit\r")
    assert server.recv(5) == b"exit\r"
    server.close()
    assert client.recv(1) == b""
    client.close()
    assert running.access_lines(1)[0]["end"] == "eof"
