# SPDX-License-Identifier: Apache-2.0
"""The gateway on the relay, in this process: its start, its workers and its end."""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import threading
import time
from functools import partial
from itertools import pairwise
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import pytest

from sockgw import _bpf
from sockgw.config import Accel, Address, Config
from sockgw.errors import ConfigError
from sockgw.gateway import Gateway
from sockgw.lifetime import Session
from sockgw.listener import RETRY_S, Listener
from sockgw.metrics import ENDS, Tally
from sockgw.session import End, Path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sockgw.worker import Worker

DEADLINE_S = 5.0


class Backend:
    """A listening socket whose connections the test accepts."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(DEADLINE_S)
        self.address = Address(*self._listener.getsockname())

    def accept(self) -> socket.socket:
        sock, _ = self._listener.accept()
        sock.settimeout(DEADLINE_S)
        return sock

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def backend() -> Iterator[Backend]:
    """A backend."""
    made = Backend()
    yield made
    made.close()


@pytest.fixture(params=["compiled", "python"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the workers sleep in: the loop in C, or the one for want of the binding."""
    if request.param == "python":
        monkeypatch.setattr(_bpf, "IS_BUILT", False)
    return request.param


only_compiled = pytest.mark.parametrize("loop", ["compiled"], indirect=True)
only_python = pytest.mark.parametrize("loop", ["python"], indirect=True)
"""For what looks at a session in Python: plain ones of the loop in C are not there."""


@pytest.fixture
def start(backend: Backend, loop: str) -> Iterator[Callable[..., Gateway]]:
    """Start gateways before the backend, and close what the test left open."""
    started: list[Gateway] = []

    def start_one(**options: Any) -> Gateway:
        settings = {
            "listen": Address("127.0.0.1", 0),
            "backends": (backend.address,),
            "accel": Accel.OFF,
            "metrics": None,
            "threads": 2,
        }
        gateway = Gateway(Config(**{**settings, **options}))
        gateway.start()
        started.append(gateway)
        return gateway

    yield start_one
    for gateway in started:
        gateway.close()
        with contextlib.suppress(RuntimeError):  # of a worker that was made to die
            gateway.wait(DEADLINE_S)


def open_fds() -> int:
    return len(list(FilePath("/proc/self/fd").iterdir()))


def own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("sockgw")}


def connect(gateway: Gateway) -> socket.socket:
    host, port = gateway.address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=DEADLINE_S)


def eventually(is_true: Callable[[], Any], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not is_true():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.001)


def open_sessions(gateway: Gateway) -> int:
    return sum(gateway.snapshot().sessions_active.values())


def ended(gateway: Gateway, end: End) -> int:
    return gateway.snapshot().tally.sessions_ended[end.value]


def exchange(client: socket.socket, server: socket.socket) -> None:
    client.sendall(b"request")
    assert server.recv(100) == b"request"
    server.sendall(b"answer")
    assert client.recv(100) == b"answer"


def is_reset(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) is None
    except ConnectionResetError:
        return True


def test_session_through_the_gateway(start: Any, backend: Backend) -> None:
    """Bytes and FINs pass, and the session is counted and forgotten."""
    gateway = start()
    assert gateway.path is Path.RELAY
    with connect(gateway) as client, backend.accept() as server:
        exchange(client, server)
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        server.sendall(b"late")
        server.close()
        assert client.recv(100) == b"late"
        assert client.recv(1) == b""
    eventually(lambda: ended(gateway, End.EOF) and not open_sessions(gateway), "the session ends")
    tally = gateway.snapshot().tally
    assert tally.sessions_total["relay"] == tally.sessions_ended["eof"] == 1
    assert tally.bytes["to_backend", "relay"] == len(b"request")
    assert tally.bytes["to_client", "relay"] == len(b"answerlate")


def test_nothing_is_left_after_the_end(start: Any, backend: Backend) -> None:
    """A gateway that has ended leaves no descriptor and no thread."""
    fds, threads = open_fds(), own_threads()
    gateway = start(metrics=Address("127.0.0.1", 0))
    with connect(gateway) as client, backend.accept() as server:
        exchange(client, server)
        gateway.close()
        assert gateway.wait(DEADLINE_S)
        assert is_reset(client)
        assert is_reset(server)
    eventually(lambda: own_threads() <= threads, "the threads are gone")
    assert open_fds() == fds


def test_drain_lets_sessions_end(start: Any, backend: Backend) -> None:
    """A draining gateway accepts nobody, and waits for its sessions."""
    gateway = start()
    with connect(gateway) as client, backend.accept() as server:
        exchange(client, server)
        gateway.drain()
        gateway.drain()
        with pytest.raises(ConnectionRefusedError):
            connect(gateway)
        assert not gateway.wait(0.05)
        exchange(client, server)
        client.close()
        server.close()
        assert gateway.wait(DEADLINE_S)
    assert gateway.wait(0)


def test_drain_has_an_end(start: Any, backend: Backend) -> None:
    """Sessions that outlast the drain's time are reset."""
    gateway = start(drain_timeout_s=0.05)
    with connect(gateway) as client, backend.accept() as server:
        exchange(client, server)
        gateway.drain()
        workers = list(gateway._workers)
        assert gateway.wait(DEADLINE_S)
        assert is_reset(client)
    assert Tally.merge(worker.tally for worker in workers).sessions_ended["drain_timeout"] == 1


def test_idle_session_is_reset(start: Any, backend: Backend) -> None:
    """A session on which nothing moves for the idle time is reset, an active one is not."""
    gateway = start(idle_timeout_s=1.0)  # far more than this test may be held up
    with contextlib.ExitStack() as stack:
        idle, idle_server, active, active_server = (
            stack.enter_context(open_one())
            for open_one in (lambda: connect(gateway), backend.accept) * 2
        )
        deadline_s = time.monotonic() + DEADLINE_S
        while open_sessions(gateway) == 2:
            assert time.monotonic() < deadline_s
            exchange(active, active_server)
        assert is_reset(idle)
        assert is_reset(idle_server)
        exchange(active, active_server)


def in_one_round(worker: Worker, *steps: Callable[[], Any]) -> None:
    """Have `worker` take all `steps` between two polls of its loop."""
    gate = threading.Event()
    worker.order(lambda: gate.wait(DEADLINE_S))
    for step in steps:
        worker.order(step)
    gate.set()


def test_session_that_comes_with_the_end(start: Any, backend: Backend) -> None:
    """A session that is accepted in the round in which all are reset does not outlive them."""
    gateway = start(threads=1)
    (worker,) = gateway._workers
    in_one_round(
        worker,
        lambda: select.select([worker.listener.socket], [], [], DEADLINE_S),
        worker._on_connection,
        partial(worker.close_sessions, End.CLOSED),
    )
    with pytest.raises(ConnectionResetError), connect(gateway) as client:
        client.recv(1)
    eventually(lambda: ended(gateway, End.CLOSED) == 1, "the session ends")


@only_compiled
def test_idle_sessions_are_told_from_others(start: Any, backend: Backend) -> None:
    """A session that leaves the loop in the round in which another is idle goes on."""
    gateway = start(threads=1)
    (worker,) = gateway._workers
    with contextlib.ExitStack() as stack:
        idle, idle_server, busy, busy_server = (
            stack.enter_context(open_one())
            for open_one in (lambda: connect(gateway), backend.accept) * 2
        )
        exchange(idle, idle_server)
        exchange(busy, busy_server)
        in_one_round(
            worker,
            lambda: eventually(
                lambda: (worker.loop.poll(0.001), worker.loop.open == 1)[1], "its backend is full"
            ),
            partial(setattr, worker, "_idle_timeout_s", 1e-9),
            worker._sweep,
            partial(setattr, worker, "_idle_timeout_s", 3600.0),
        )
        sent = 0
        busy.setblocking(False)
        while worker.loop.open == 2:
            with contextlib.suppress(BlockingIOError):
                sent += busy.send(bytes(64 << 10))
        assert is_reset(idle)
        while sent:
            got = len(busy_server.recv(1 << 20))
            assert got
            sent -= got
    eventually(
        lambda: (ended(gateway, End.IDLE_TIMEOUT), ended(gateway, End.EOF)) == (1, 1),
        "both sessions end",
    )


@only_python
def test_session_that_meets_a_bug_ends_alone(
    start: Any, backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception in one session is logged and ends it; its neighbours go on."""
    gateway = start(threads=1)
    real = Session.on_event
    unlucky: list[Session] = []

    def on_event(session: Session, fd: int, mask: int) -> None:
        if session in unlucky:
            raise RuntimeError("a bug")
        real(session, fd, mask)

    monkeypatch.setattr(Session, "on_event", on_event)
    with connect(gateway) as client, backend.accept() as server:
        exchange(client, server)
        (first,) = next(iter(gateway._workers)).sessions
        with connect(gateway) as other, backend.accept() as other_server:
            exchange(other, other_server)
            unlucky.append(first)
            client.sendall(b"x")
            assert is_reset(client)
            assert is_reset(server)
            exchange(other, other_server)
    assert "a bug" in caplog.text
    eventually(lambda: not open_sessions(gateway), "both sessions end")
    assert ended(gateway, End.ERROR) == 1


@pytest.mark.parametrize("is_own", [True, False], ids=["its_own", "of_another"])
def test_worker_that_dies_takes_the_gateway_along(
    start: Any, backend: Backend, caplog: pytest.LogCaptureFixture, is_own: bool
) -> None:
    """A gateway that has lost a worker resets every session, and says why it ends."""
    gateway = start()
    with connect(gateway) as client, backend.accept() as server:
        exchange(client, server)

        def fail() -> None:
            raise RuntimeError("the worker broke")

        worker = next(w for w in gateway._workers if bool(sum(w.active.values())) == is_own)
        worker.order(fail)
        with pytest.raises(RuntimeError, match="the worker broke"):
            gateway.wait(DEADLINE_S)
        assert is_reset(client)
        assert is_reset(server)
    assert "the worker broke" in caplog.text


def test_timers_run_in_their_order(start: Any) -> None:
    """What is due first runs first, and nothing runs for a session that is closed."""
    gateway = start(threads=1)
    worker: Worker = next(iter(gateway._workers))
    ran: list[int] = []
    done = threading.Event()

    def arrange() -> None:
        for number in (3, 1, 2):
            worker.after(number / 100, None, lambda number=number: ran.append(number))
        closed = Session.__new__(Session)
        closed.is_closed = True
        worker.after(0.0, closed, lambda: ran.append(0))
        worker.after(0.04, None, done.set)

    worker.order(arrange)
    assert done.wait(DEADLINE_S)
    assert ran == [1, 2, 3]


def test_limit_lets_clients_wait(start: Any, backend: Backend) -> None:
    """At --max-connections clients wait, and are served as others leave."""
    gateway = start(max_connections=1)
    with connect(gateway) as first, backend.accept() as first_server:
        exchange(first, first_server)
        with connect(gateway) as second:
            second.sendall(b"request")
            assert open_sessions(gateway) == 1
            first.close()
            first_server.close()
            with backend.accept() as second_server:
                assert second_server.recv(100) == b"request"


def test_no_descriptor_for_a_client(
    start: Any, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a descriptor a client waits, and the worker tries again, ten times a second."""
    real = Listener.accept
    tried_s: list[float] = []

    def accept(listener: Listener, take: Any, most: int) -> None:
        def fail(*_ignored: Any) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        tried_s.append(time.monotonic())
        real(listener, fail if len(tried_s) < 4 else take, most)

    monkeypatch.setattr(Listener, "accept", accept)
    gateway = start(threads=1)
    with connect(gateway) as client, backend.accept() as server:
        exchange(client, server)
    pauses_s = [after - before for before, after in pairwise(tried_s[:4])]
    assert min(pauses_s) >= RETRY_S * 0.9


def test_backend_that_refuses_resets_the_client(start: Any) -> None:
    """A client without a backend is reset, not left hanging."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        gateway = start(backends=(Address(*bound.getsockname()),))
        with pytest.raises(ConnectionResetError), connect(gateway) as client:
            client.recv(1)
    eventually(lambda: not open_sessions(gateway), "the session ends")
    tally = gateway.snapshot().tally
    assert tally.dial_errors["refused"] == tally.sessions_ended["dial_failed"] == 1


def test_start_that_fails_leaves_nothing(start: Any, backend: Backend) -> None:
    """Whatever is wrong, a start that fails gives back what it had."""
    fds, threads = open_fds(), own_threads()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address(*taken.getsockname())
        for options, error in (
            ({"listen": address}, OSError),
            ({"metrics": address}, OSError),
            ({"persist": FilePath("/")}, ConfigError),
            ({"backends": (Address("no-such-host.invalid", 1),)}, ConfigError),
        ):
            with pytest.raises(error):
                start(**options)
    eventually(lambda: own_threads() <= threads, "the threads are gone")
    assert open_fds() == fds


def test_ready_line(start: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The line that says it is ready names the real address and the path."""
    with caplog.at_level(logging.INFO, logger="sockgw"):
        gateway = start()
    assert f"listening on {gateway.address}, backend 127.0.0.1:" in caplog.text
    assert "path relay, metrics off" in caplog.text
    assert not gateway.address.endswith(":0")


def test_every_end_is_a_label() -> None:
    """Each way to end has a series of its own from the start."""
    assert {end.value for end in End} == set(ENDS)
