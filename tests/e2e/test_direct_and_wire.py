# SPDX-License-Identifier: Apache-2.0
"""Direct and wire in one gateway: who is not captured goes by wire, from whatever moment on.

Nobody is captured whose socket is not of the cgroup that --cgroup names: so the
tests say whom. SOCKGW_TEST_SEED=N repeats a random run.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pytest

from . import kernel
from .gateways import run_sockgw
from .network import Site, place_at
from .peers import Backend, close_clients, connect, is_reset, reset, unused_port
from .plans import Run, serve
from .traffic import (
    KIB,
    MIB,
    Receipt,
    Stream,
    Task,
    exchange,
    finish,
    go_direct,
    pause,
    random_seed,
    receive,
    send,
    send_and_finish,
)
from .waits import DEADLINE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .conftest import StartGateway
    from .gateways import Gateway, Metrics

pytestmark = pytest.mark.usefixtures("root", "kernel_path")

DIRECTIONS = ("to_backend", "to_client")
PATHS = ("direct", "wire", "splice", "relay")
USAGE = 2
FEW_RIGHTS = ("setpriv", "--inh-caps", "-all", "--bounding-set", "-all,+sys_admin,+sys_resource")


# --- who is captured, and what the gateway says --------------------------------


class Captured:
    """A cgroup, for --cgroup: the sockets that are made in it are captured."""

    def __init__(self, path: Path) -> None:
        """Make it."""
        self.path = path
        path.mkdir()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Be in it for the body: a socket stays in the cgroup that it was made in."""
        self._enter(self.path)
        try:
            yield
        finally:
            self._enter(self.path.parent)

    def _enter(self, path: Path) -> None:
        (path / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        """Remove it."""
        self.path.rmdir()


@pytest.fixture
def captured(root: None) -> Iterator[Captured]:
    """A cgroup of the test's own."""
    cgroup = Captured(kernel.cgroup2_mounts()[0] / f"sockgw-test-{os.getpid()}")
    yield cgroup
    cgroup.close()


@pytest.fixture
def backend(captured: Captured) -> Iterator[Backend]:
    """A backend that is captured when a gateway dials it."""
    with captured.entered():
        listening = Backend()
    yield listening
    listening.close()


@pytest.fixture
def gateway(start: StartGateway, captured: Captured) -> StartGateway:
    """Start gateways with --accel direct, for who is in the cgroup."""

    def start_here(*backends: str, **options: object) -> Gateway:
        running = start(*backends, **{"accel": "direct", "cgroup": captured.path, **options})
        assert running.path == "direct"
        return running

    return start_here


class Ends(NamedTuple):
    """Both ends of a session."""

    client: socket.socket
    server: socket.socket


class Sessions:
    """Opens sessions."""

    def __init__(self, captured: Captured) -> None:
        """Open none yet."""
        self._captured = captured
        self.servers: list[socket.socket] = []

    def inside(self, running: Gateway, backend: Backend) -> Ends:
        """Open one whose client is captured."""
        with self._captured.entered():
            return self.outside(running, backend)

    def outside(self, running: Gateway, backend: Backend) -> Ends:
        """Open one whose client is not."""
        client = connect(running.address)
        self.servers.append(backend.accept())
        return Ends(client, self.servers[-1])


@pytest.fixture
def sessions(captured: Captured) -> Iterator[Sessions]:
    """Open sessions, and close what the test leaves open."""
    opening = Sessions(captured)
    yield opening
    close_clients()
    for server in opening.servers:
        server.close()


def _has_accepted(running: Gateway, count: int) -> bool:
    metrics = running.metrics()
    ended = metrics.value("gateway_sessions_ended_total")
    return metrics.value("gateway_sessions_active") + ended >= count


def _active(metrics: Metrics, path: str) -> int:
    return int(metrics.value("gateway_sessions_active", path=path))


def _talk_until(running: Gateway, ends: Ends, count: int = 1, *, path: str = "wire") -> None:
    """Talk until `count` sessions are on `path`."""

    def talk() -> bool:
        exchange(*ends)
        return _active(running.metrics(), path) == count

    eventually(f"{count} sessions on {path}", talk)


def _receive_blocking(sock: socket.socket, has_begun: threading.Event) -> Receipt:
    """Read to the end by calls that wait in the kernel."""
    sock.settimeout(None)
    data = bytearray()
    while True:
        # What README.md says of the first recv() that waits: it may return EAGAIN.
        with contextlib.suppress(BlockingIOError):
            got = sock.recv(64 * KIB)
            if not got:
                return Receipt.of(bytes(data))
            data += got
            has_begun.set()


def _assert_sums(running: Gateway, sessions: int, moved: dict[str, int]) -> None:
    """Compare what metrics and log say of `sessions` that have ended with what was sent."""
    lines = running.access_lines(sessions)
    metrics = running.metrics()
    assert len(lines) == sessions
    assert metrics.value("gateway_sessions_total") == sessions
    assert metrics.value("gateway_sessions_ended_total") == sessions
    for direction in DIRECTIONS:
        assert sum(line.bytes(direction) for line in lines) == moved[direction]
        for path in PATHS:
            logged = sum(line.bytes(direction, path) for line in lines)
            assert metrics.bytes_by(direction=direction, path=path) == logged, (direction, path)


# --- who goes by wire ----------------------------------------------------------


@pytest.mark.parametrize("is_ipv6", [False, True], ids=["IPv4", "IPv6"])
def test_backend_on_another_machine(
    gateway: StartGateway, tmp_path: Path, *, is_ipv6: bool
) -> None:
    """Between three machines, where nobody is captured, sessions go by wire."""
    site = Site("links", is_far=True, is_ipv6=is_ipv6)
    with place_at(site, tmp_path) as place, place.backend() as backend:
        running = gateway(backend.address, listen=place.listen, netns=place.netns)
        ends = Ends(place.connect(running.address), backend.accept())
        _talk_until(running, ends)
        up, down = Stream(1, 8 * MIB), Stream(2, 8 * MIB)
        finish(*ends, up, down)
        line = running.access_lines(1)[0]
        assert line["path"] == "wire"
        for direction in DIRECTIONS:
            assert line.bytes(direction, "wire") >= up.length
        assert running.warnings() == []
        assert running.metrics().value("gateway_fallbacks_total", reason="not_captured") == 1
        assert running.metrics().value("gateway_fallbacks_total") == 1
        running.await_idle()
        assert running.stop() == 0


def test_both_at_once(gateway: StartGateway, backend: Backend, sessions: Sessions) -> None:
    """A captured session and one that is not: both transfer whole, direct and by wire."""
    running = gateway(backend.address)
    inside = sessions.inside(running, backend)
    outside = sessions.outside(running, backend)
    go_direct(running, *inside)
    _talk_until(running, outside)
    assert _active(running.metrics(), "direct") == 1
    spoken = running.metrics()
    before = {way: int(spoken.value("gateway_bytes_total", direction=way)) for way in DIRECTIONS}
    streams = [Stream(number, 16 * MIB) for number in range(4)]
    tasks = [
        Task(finish, *inside, streams[0], streams[1]),
        Task(finish, *outside, streams[2], streams[3]),
    ]
    for task in tasks:
        task.result()
    by_path = {line["path"]: line for line in running.access_lines(2)}
    for direction in DIRECTIONS:
        assert by_path["direct"].bytes(direction, "direct") > 0
        assert by_path["direct"].bytes(direction, "wire") == 0
        assert by_path["wire"].bytes(direction, "wire") >= 16 * MIB
        assert by_path["wire"].bytes(direction, "direct") == 0
    _assert_sums(running, 2, {way: before[way] + 32 * MIB for way in DIRECTIONS})


@pytest.mark.parametrize("processes", [1, 2])
def test_random_transfers(
    gateway: StartGateway, backend: Backend, captured: Captured, processes: int
) -> None:
    """Random two-way transfers of a crowd, half of it captured, arrive as they were sent."""
    running = gateway(backend.address, processes=processes)
    run = Run(random_seed(), longest=4 * MIB)
    count = 64  # of 20 that are not captured 3 to 10 last until they are on wire
    enough = threading.Event()
    serving = Task(serve, backend, run, enough)
    # Both kinds at once, and some of each find the other kind on its way.
    clients = []
    for half in range(2):
        with captured.entered() if half else contextlib.nullcontext():
            clients += [
                Task(run.client, running.address, number)
                for number in range(half * count // 2, (half + 1) * count // 2)
            ]
            # Their sockets are made by now, in the cgroup or not.
            eventually("all accepted", partial(_has_accepted, running, (half + 1) * count // 2))
    for task in clients:
        task.result()
    enough.set()
    serving.result()
    to_backend, to_client = run.check(count)
    running.await_idle()
    _assert_sums(running, count, {"to_backend": to_backend, "to_client": to_client})
    paths = {line["path"] for line in running.access_lines(count)}
    assert {"direct", "wire"} <= paths


def test_first_backend_that_refuses(
    gateway: StartGateway, backend: Backend, sessions: Sessions
) -> None:
    """Behind a dial that failed a session takes the same path as any other."""
    running = gateway(f"127.0.0.1:{unused_port()}", backend.address, threads=1)
    for _ in range(2):  # each backend's turn
        outside = sessions.outside(running, backend)
        inside = sessions.inside(running, backend)
        _talk_until(running, outside)
        go_direct(running, *inside)
        for sock in (*inside, *outside):
            sock.close()
        running.await_sessions(0)
    assert sum(running.metrics().samples("gateway_dial_errors_total")) == 2


def test_backend_that_defers_accepting(
    gateway: StartGateway, captured: Captured, sessions: Sessions
) -> None:
    """TCP_DEFER_ACCEPT: a backend that is established by the client's first bytes is captured."""
    with captured.entered():
        backend = Backend()
        backend._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 10)
    with backend:
        running = gateway(backend.address)
        with captured.entered():
            client = connect(running.address)
        pause(0.3)
        client.sendall(b"ping")
        server = backend.accept()
        server.sendall(b"pong")
        assert server.recv(4) == b"ping"
        assert client.recv(4) == b"pong"
        go_direct(running, client, server)
        client.close()
        server.close()
        assert running.access_lines(1)[0]["path"] == "direct"


def test_unfit_for_both(gateway: StartGateway, tmp_path: Path) -> None:
    """Who is neither captured nor fit for the wire goes by splice, and is counted for each."""
    site = Site("links", is_far=True, is_ipv6=False)
    with place_at(site, tmp_path) as place, place.backend() as backend:
        place.machines.client.sysctl("net.ipv4.tcp_timestamps", 0)
        running = gateway(backend.address, listen=place.listen, netns=place.netns)
        ends = Ends(place.connect(running.address), backend.accept())
        _talk_until(running, ends, path="splice")
        finish(*ends, Stream(1, 4 * MIB), Stream(2, 4 * MIB))
        metrics = running.metrics()
        assert metrics.value("gateway_fallbacks_total", reason="not_captured") == 1
        assert metrics.value("gateway_fallbacks_total", reason="timestamps") == 1
        assert metrics.value("gateway_fallbacks_total") == 2
        assert running.access_lines(1)[0]["path"] == "splice"
        running.await_idle()
        assert running.stop() == 0


def test_without_wire(gateway: StartGateway, backend: Backend, sessions: Sessions) -> None:
    """Where the kernel, or our rights, have no wire, one warning says so, and splice is taken."""
    running = gateway(backend.address, prefix=FEW_RIGHTS)
    (warning,) = running.warnings()
    assert "no session goes by wire" in warning
    assert "CAP_NET_RAW" in warning
    inside = sessions.inside(running, backend)
    outside = sessions.outside(running, backend)
    go_direct(running, *inside)
    _talk_until(running, outside, path="splice")
    finish(*inside, Stream(1, MIB), Stream(2, MIB))
    finish(*outside, Stream(3, MIB), Stream(4, MIB))
    assert sorted(line["path"] for line in running.access_lines(2)) == ["direct", "splice"]


# --- what leaves direct --------------------------------------------------------


def test_server_that_waits_in_recv(
    gateway: StartGateway, backend: Backend, sessions: Sessions
) -> None:
    """A backend that blocks is left to TCP, and its session goes by wire while it talks."""
    running = gateway(backend.address)
    ends = sessions.inside(running, backend)
    ends.server.settimeout(None)
    # No pause in it: what is under way is never both behind and before the switch.
    _talk_until(running, ends)
    metrics = running.metrics()
    assert metrics.value("gateway_fallbacks_total", reason="blocking") == 1
    assert metrics.value("gateway_ebpf_active_pairs") == 0
    spoken = int(metrics.value("gateway_bytes_total", direction="to_backend"))
    finish(*ends, Stream(1, 8 * MIB), Stream(2, 8 * MIB))
    line = running.access_lines(1)[0]
    assert line["end"] == "eof"
    assert line["path"] == "wire"
    assert line.bytes("to_backend", "relay") > 0
    assert line.bytes("to_backend", "wire") >= 8 * MIB
    _assert_sums(running, 1, dict.fromkeys(DIRECTIONS, spoken + 8 * MIB))


def test_handed_back_under_way(gateway: StartGateway, backend: Backend, sessions: Sessions) -> None:
    """Random pieces under way in both directions when a session leaves direct for the wire."""
    rng = random.Random(random_seed())
    running = gateway(backend.address)
    pairs = [sessions.inside(running, backend) for _ in range(8)]

    def pieces(own: random.Random) -> Iterator[int]:
        while True:
            yield own.choice((own.randint(1, 100), own.randint(1, 20_000)))

    def feed(sock: socket.socket, stream: Stream, seed: int, may_begin: threading.Event) -> None:
        own = random.Random(seed)
        assert may_begin.wait(DEADLINE_S)
        send(sock, stream, chunks=pieces(own), before_each=lambda: pause(own.random() * 0.002))
        sock.shutdown(socket.SHUT_WR)

    tasks = []
    for number, ends in enumerate(pairs):
        up, down = Stream(2 * number, 2 * MIB), Stream(2 * number + 1, 2 * MIB)
        now, has_read = threading.Event(), threading.Event()
        now.set()
        tasks += [
            (Task(_receive_blocking, ends.server, has_read), up.receipt()),
            (Task(receive, ends.client), down.receipt()),
            (Task(feed, ends.client, up, rng.getrandbits(32), now), None),
            (Task(feed, ends.server, down, rng.getrandbits(32), has_read), None),
        ]
    for task, receipt in tasks:
        assert task.result() == receipt
    for ends in pairs:
        for sock in ends:
            sock.close()
    lines = running.access_lines(len(pairs))
    assert {line["end"] for line in lines} == {"eof"}
    assert "wire" in {line["path"] for line in lines}
    _assert_sums(running, len(pairs), dict.fromkeys(DIRECTIONS, len(pairs) * 2 * MIB))


def test_some_bytes_went_direct(
    gateway: StartGateway, backend: Backend, sessions: Sessions
) -> None:
    """A session that has gone direct before both its ends were left to TCP goes by wire, too."""
    running = gateway(backend.address)
    ends = sessions.inside(running, backend)
    go_direct(running, *ends)
    for sock in ends:  # from now on they are left to TCP
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)
    _talk_until(running, ends)
    for sock in ends:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    spoken = int(running.metrics().value("gateway_bytes_total", direction="to_backend"))
    finish(*ends, Stream(1, MIB), Stream(2, MIB))
    line = running.access_lines(1)[0]
    for direction in DIRECTIONS:
        assert line.bytes(direction, "direct") > 0
        assert line.bytes(direction, "relay") > 0
        assert line.bytes(direction, "wire") >= MIB
    _assert_sums(running, 1, dict.fromkeys(DIRECTIONS, spoken + MIB))


# --- the end -------------------------------------------------------------------


def _on_wire(running: Gateway, backend: Backend, sessions: Sessions, how: str) -> Ends:
    """Open a session and talk until it is on wire: never captured, or left to TCP."""
    if how == "uncaptured":
        ends = sessions.outside(running, backend)
    else:
        ends = sessions.inside(running, backend)
        ends.server.settimeout(None)
    _talk_until(running, ends)
    return ends


def _one_of_each(running: Gateway, backend: Backend, sessions: Sessions) -> tuple[Ends, Ends]:
    """Open a session on wire, and one on direct."""
    outside, inside = sessions.outside(running, backend), sessions.inside(running, backend)
    _talk_until(running, outside)
    go_direct(running, *inside)
    return outside, inside


how_on_wire = pytest.mark.parametrize("how", ["uncaptured", "blocking"])


@how_on_wire
@pytest.mark.parametrize("is_client_first", [True, False], ids=["client", "backend"])
def test_half_close(
    gateway: StartGateway, backend: Backend, sessions: Sessions, how: str, *, is_client_first: bool
) -> None:
    """One side may end long before the other."""
    running = gateway(backend.address)
    ends = _on_wire(running, backend, sessions, how)
    first, second = ends if is_client_first else ends[::-1]
    first.shutdown(socket.SHUT_WR)
    assert second.recv(1) == b""
    stream = Stream(1, 2 * MIB)
    sending = Task(send_and_finish, second, stream)
    assert receive(first) == stream.receipt()
    sending.result()
    assert running.access_lines(1)[0]["end"] == "eof"


@how_on_wire
@pytest.mark.parametrize("is_client", [True, False], ids=["client", "backend"])
def test_reset(
    gateway: StartGateway, backend: Backend, sessions: Sessions, how: str, *, is_client: bool
) -> None:
    """A reset of one side resets the other."""
    running = gateway(backend.address)
    ends = _on_wire(running, backend, sessions, how)
    near, far = ends if is_client else ends[::-1]
    reset(near)
    assert is_reset(far, within_s=2)
    far.close()
    expected = "client_reset" if is_client else "backend_reset"
    assert running.access_lines(1)[0]["end"] == expected


def test_idle_timeout(gateway: StartGateway, backend: Backend, sessions: Sessions) -> None:
    """Sessions of both kinds are reset when they are idle."""
    running = gateway(backend.address, idle_timeout="1s")
    outside, inside = _one_of_each(running, backend, sessions)
    for sock in (*inside, *outside):
        assert is_reset(sock, within_s=5)
        sock.close()
    assert {line["end"] for line in running.access_lines(2)} == {"idle_timeout"}


def test_drain(gateway: StartGateway, backend: Backend, sessions: Sessions) -> None:
    """A drain waits for sessions of both kinds."""
    running = gateway(backend.address, drain_timeout=20)
    outside, inside = _one_of_each(running, backend, sessions)
    running.signal(signal.SIGTERM)
    for ends in (outside, inside):
        exchange(*ends, b"still here")
        finish(*ends, Stream(1, MIB), Stream(2, MIB))
    assert running.await_exit() == 0
    assert sorted(line["path"] for line in running.access_lines(2)) == ["direct", "wire"]


def test_killed(gateway: StartGateway, backend: Backend, sessions: Sessions) -> None:
    """After `kill -9` sessions of both kinds are reset, and nothing is left."""
    running = gateway(backend.address)
    outside, inside = _one_of_each(running, backend, sessions)
    running.signal(signal.SIGKILL)
    running.await_exit()
    for sock in (*inside, *outside):
        assert is_reset(sock, within_s=5)
        sock.close()
    running.assert_nothing_in_kernel()


def test_persistence(
    gateway: StartGateway, backend: Backend, sessions: Sessions, bpffs: Path
) -> None:
    """With --persist what is on wire outlives the gateway, and what is direct is reset."""
    first = gateway(backend.address, persist=bpffs / "sockgw")
    outside, inside = _one_of_each(first, backend, sessions)
    first.signal(signal.SIGKILL)
    first.await_exit()
    for sock in inside:
        assert is_reset(sock, within_s=5)
        sock.close()
    exchange(*outside, b"between" * 1000)
    second = gateway(backend.address, persist=bpffs / "sockgw")
    inside = sessions.inside(second, backend)
    go_direct(second, *inside)
    _talk_until(second, outside)
    for ends in (outside, inside):
        finish(*ends, Stream(1, MIB), Stream(2, MIB))
    assert sorted(line["path"] for line in second.access_lines(2)) == ["direct", "wire"]
    assert second.stop() == 0
    assert run_sockgw("clean", str(bpffs / "sockgw")).returncode in {0, USAGE}
    first.assert_nothing_in_kernel()


# --- short sessions ------------------------------------------------------------


def test_short_sessions(gateway: StartGateway, backend: Backend, sessions: Sessions) -> None:
    """Sessions that are over before anybody looks are whole, and counted once each."""
    running = gateway(backend.address)
    count = 400
    for number in range(count):
        opened = sessions.inside if number % 2 else sessions.outside
        ends = opened(running, backend)
        exchange(*ends)
        for sock in ends:
            sock.close()
    assert {line["end"] for line in running.access_lines(count)} == {"eof"}
    running.await_idle()
    _assert_sums(running, count, dict.fromkeys(DIRECTIONS, 4 * count))
