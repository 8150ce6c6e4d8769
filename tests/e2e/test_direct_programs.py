# SPDX-License-Identifier: Apache-2.0
"""Direct between programs as Debian has them; test_programs.py has those for every path."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .paths import PATHS
from .peers import connect, split_address, unused_port
from .programs import nginx, require, running
from .traffic import KIB, MIB, Stream, Task, receive_exactly, send

if TYPE_CHECKING:
    from .conftest import StartGateway
    from .gateways import Gateway

pytestmark = pytest.mark.parametrize(
    "path",
    [path for path in PATHS if path.label == "direct" and path.processes == 1],
    indirect=True,
    ids=lambda path: path.name,
)

APPLICATIONS = Path(__file__).with_name("applications")
_PROGRAM_S = 60
_ASKED = 40


def _run(*command: str | Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=_PROGRAM_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def _assert_direct(gateway: Gateway, *, to_backend: int = 0, to_client: int = 0) -> None:
    """Fail unless that many bytes went direct."""
    metrics = gateway.metrics()
    for direction, least in (("to_backend", to_backend), ("to_client", to_client)):
        moved = metrics.bytes_by(direction=direction, path="direct")
        assert moved >= least, f"{direction}: {moved} bytes direct"


@pytest.mark.parametrize(
    ("program", "file"), [("node", "http.js"), ("java", "Http.java")], ids=["Node", "Java"]
)
def test_http(gateway: StartGateway, tmp_path: Path, program: str, file: str) -> None:
    """The http client and server of a runtime: bodies of many sizes both ways, one connection."""
    command = [require(program), *(["-Xshare:auto"] if program == "java" else [])]
    command.append(str(APPLICATIONS / file))
    port = unused_port()
    address = f"127.0.0.1:{port}"
    with running([*command, "serve", str(port)], address=address, log=tmp_path / "log"):
        through = gateway(address)
        _, listen = split_address(through.address)
        assert _run(*command, "ask", str(listen), str(_ASKED)) == f"ok {_ASKED}\n"
        if program == "node":
            _assert_direct(through, to_backend=MIB, to_client=MIB)


def test_python_http_server(gateway: StartGateway, tmp_path: Path) -> None:
    """curl fetches a file, again and again on one connection, from a server that blocks."""
    stream = Stream(1, 3 * MIB)
    (tmp_path / "file").write_bytes(stream.all())
    port = unused_port()
    command = [sys.executable, "-m", "http.server", "-b", "127.0.0.1", "-d", str(tmp_path)]
    command += ["--protocol", "HTTP/1.1"] if sys.version_info >= (3, 11) else []
    with running([*command, str(port)], address=f"127.0.0.1:{port}", log=tmp_path / "log"):
        through = gateway(f"127.0.0.1:{port}")
        names = [tmp_path / f"body{number}" for number in range(10)]
        words = [word for name in names for word in ("-o", name, f"http://{through.address}/file")]
        _run(require("curl"), "-sS", "--fail", "--noproxy", "*", *words)
        for name in names:
            assert hashlib.sha256(name.read_bytes()).hexdigest() == stream.receipt().sha256


def test_wrk_and_nginx(gateway: StartGateway, tmp_path: Path) -> None:
    """wrk asks nginx for 1 KiB and for 1 MiB, sent by sendfile, and has no error."""
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "small").write_bytes(Stream(1, KIB).all())
    (tmp_path / "www" / "large").write_bytes(Stream(2, MIB).all())
    with nginx(tmp_path) as web:
        through = gateway(web)
        for name in ("small", "large"):
            said = _run(
                *(require("wrk"), "-t", "1", "-c", "20", "-d", "2s"),
                f"http://{through.address}/{name}",
            )
            assert "requests in" in said
            assert "Socket errors" not in said, said
            assert "Non-2xx" not in said, said
        _assert_direct(through, to_backend=10_000, to_client=MIB)


@pytest.mark.parametrize("options", [[], ["-R"], ["--zerocopy"]], ids=["up", "down", "sendfile"])
def test_iperf3(gateway: StartGateway, tmp_path: Path, options: list[str]) -> None:
    """iperf3 streams each way, by write and by sendfile; however they go."""
    port = unused_port()
    command = [require("iperf3"), "-s", "-B", "127.0.0.1", "-p", str(port)]
    with running(command, address=f"127.0.0.1:{port}", log=tmp_path / "log"):
        through = gateway(f"127.0.0.1:{port}")
        _, listen = split_address(through.address)
        words = ["-c", "127.0.0.1", "-p", str(listen), "-n", "200M", "-J", *options]
        end = json.loads(_run(require("iperf3"), *words))["end"]
        sent, received = end["sum_sent"]["bytes"], end["sum_received"]["bytes"]
        assert sent >= 200 * MIB
        assert received > 0.9 * sent  # those after its last message are not counted


def test_io_uring(gateway: StartGateway, tmp_path: Path) -> None:
    """A server that receives and sends by io_uring alone echoes what it is sent."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    if not Path("/usr/include/liburing.h").exists():
        pytest.skip("liburing.h is not installed (apt-get install liburing-dev)")
    program = tmp_path / "uring"
    _run(compiler, "-O2", "-Wall", "-Werror", "-o", program, APPLICATIONS / "uring.c", "-luring")
    port = unused_port()
    with subprocess.Popen([program, str(port)]) as server:
        try:
            through = gateway(f"127.0.0.1:{port}")
            client = connect(through.address)
            stream = Stream(1, 8 * MIB)
            for number in range(100):
                client.sendall(b"message %d" % number)
                assert client.recv(100) == b"message %d" % number
            sending = Task(send, client, stream)
            got = receive_exactly(client, stream.length)
            assert got.sha256 == stream.receipt().sha256
            sending.result()
            client.close()
            _assert_direct(through, to_backend=500, to_client=500)
            connect(through.address).close()
            assert server.wait(_PROGRAM_S) == 0
        finally:
            server.kill()
