# SPDX-License-Identifier: Apache-2.0
"""The things that e2e tests are about: a path, a gateway, a backend, the rights to run one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from .gateways import SOCKGW, Gateway, arguments_of, run_sockgw
from .paths import PATHS, PathUnderTest, each
from .peers import Backend, EchoServer, close_clients, connect

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence

    from .network import NetworkNamespace

# What the suite looks and acts with, whatever it tests; servers and strace are
# installed when a test needs them.
_TOOLS = {"bpftool": "bpftool", "ss": "iproute2", "setpriv": "util-linux"}
_CAP_SYS_ADMIN = 1 << 21
_CHECK_SPLICE_WORKS = 0
_CHECK_RELAY_ONLY = 3


@pytest.fixture(scope="session", autouse=True)
def _sockgw_is_installed() -> None:
    """Fail at once, and once, when there is nothing to test."""
    if not SOCKGW.exists():
        pytest.fail(f"{SOCKGW} does not exist; run `make` first", pytrace=False)
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            pytest.fail(f"{tool} is not installed (apt-get install {package})", pytrace=False)


@pytest.fixture(scope="session")
def splice_verdict() -> str:
    """Say why splice does not work here, by `sockgw check`; "" if it does."""
    check = run_sockgw("check")
    if check.returncode == _CHECK_SPLICE_WORKS:
        return ""
    assert check.returncode == _CHECK_RELAY_ONLY, check.stdout + check.stderr
    return check.stdout


@pytest.fixture
def kernel_path(splice_verdict: str) -> None:
    """Skip where the kernel cannot splice."""
    if splice_verdict:
        pytest.skip(f"sockgw check: relay only\n{splice_verdict}")


@pytest.fixture(params=each(*PATHS))
def path(request: pytest.FixtureRequest) -> PathUnderTest:
    """Each path in turn: all paths must satisfy the same sentences."""
    found: PathUnderTest = request.param
    if found.in_kernel:
        request.getfixturevalue("kernel_path")
    return found


class StartGateway(Protocol):
    """Starts a gateway; keyword arguments are the options of `sockgw run`."""

    def __call__(
        self,
        *backends: str,
        prefix: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        netns: NetworkNamespace | None = None,
        **options: Any,
    ) -> Gateway:
        """Start one in front of `backends`."""


@pytest.fixture
def start() -> Iterator[StartGateway]:
    """Start gateways that have all stopped cleanly, leaving nothing, when the test ends."""
    started: list[Gateway] = []

    def start_one(
        *backends: str,
        prefix: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        netns: NetworkNamespace | None = None,
        **options: Any,
    ) -> Gateway:
        gateway = Gateway(
            arguments_of(backends, options), prefix=prefix, environment=environment, netns=netns
        )
        started.append(gateway)
        return gateway

    yield start_one
    close_clients()
    problems = []
    for gateway in started:
        try:
            gateway.finish()
        except (AssertionError, OSError) as problem:
            problems.append(f"{problem}\n--- its stderr ends:\n" + "\n".join(gateway.lines[-20:]))
    assert not problems, "\n".join(problems)


@pytest.fixture
def gateway(start: StartGateway, path: PathUnderTest) -> StartGateway:
    """Start gateways on the path under test."""

    def start_on_path(*backends: str, **options: Any) -> Gateway:
        running = start(*backends, **{"accel": path.accel, "processes": path.processes, **options})
        if running.path != path.label:
            pytest.fail(f"the gateway's path is {running.path}, not {path.label}")
        return running

    return start_on_path


@pytest.fixture
def backend(_sockgw_is_installed: None) -> Iterator[Backend]:
    """A backend whose connections the test accepts itself.

    The tests that use it close their sockets; its close() is for failures.
    """
    with Backend() as listening:
        yield listening


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    """A backend that echoes."""
    with EchoServer() as serving:
        yield serving


class OpenSession(Protocol):
    """Opens a session and returns both its ends."""

    def __call__(
        self, gateway: Gateway, backend: Backend, **options: Any
    ) -> tuple[socket.socket, socket.socket]:
        """Return (client, server)."""


@pytest.fixture
def session() -> Iterator[OpenSession]:
    """Open sessions one at a time, and close what the test left open."""
    servers: list[socket.socket] = []

    def open_session(
        gateway: Gateway, backend: Backend, **options: Any
    ) -> tuple[socket.socket, socket.socket]:
        client = connect(gateway.address, **options)
        server = backend.accept()
        servers.append(server)
        return client, server

    yield open_session
    close_clients()
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def unprivileged() -> list[str]:
    """Return the command prefix that takes all rights away.

    As root, the process keeps its user id and loses every capability: the
    interpreter may lie in a home directory that nobody else may enter.
    """
    if os.geteuid() != 0:
        return []
    prefix = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"]
    subprocess.run([*prefix, "true"], check=True)
    return prefix


@pytest.fixture(scope="session")
def root() -> None:
    """Skip what only root can arrange: namespaces, mounts, other processes' calls."""
    status = Path("/proc/self/status").read_text()
    capabilities = next(line for line in status.splitlines() if line.startswith("CapEff:"))
    if os.geteuid() != 0 or not int(capabilities.split()[1], 16) & _CAP_SYS_ADMIN:
        pytest.skip("needs root, with CAP_SYS_ADMIN")


@pytest.fixture
def bpffs(tmp_path: Path, root: None) -> Iterator[Path]:
    """A bpffs of the test's own."""
    point = tmp_path / "bpf"
    point.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", point], check=True, timeout=20)
    yield point
    subprocess.run(["umount", point], check=True, timeout=20)
