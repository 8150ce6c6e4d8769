# SPDX-License-Identifier: Apache-2.0
"""`sockgw demo`: real traffic through a real gateway, and what it took.

Owns a backend of its own and one `sockgw run` for each path that this host
has, all of it on loopback, on ports that the kernel chooses. Every byte is
checked by SHA-256 where it arrives, and hashed while no clock runs. The
gateway is known here as a user knows it: by its command line, its log, its
metrics and /proc.

Longer than other modules because backend and client are the two ends of one
small protocol, and are read together.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import multiprocessing
import os
import re
import signal
import socket
import socketserver
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

import click
from prometheus_client.parser import text_string_to_metric_families

from sockgw._bpf import features

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import FrameType

_KIB: Final = 1 << 10
_MIB: Final = 1 << 20

_SESSIONS: Final = 50
_EXCHANGES: Final = 20_000
_ROUNDS: Final = 16
_ROUND_BYTES: Final = 64 * _MIB  # of a bulk transfer, from one hash to the next
_HALF_CLOSES: Final = 20
_STEP_S: Final = 2.5  # a slow host moves less in a step, it does not take longer
_DEADLINE_S: Final = 15

_ACCEL: Final = {"direct": "direct", "wire": "wire", "splice": "splice", "relay": "off"}
_SWITCHES: Final = re.compile(r"^voluntary_ctxt_switches:\s+(\d+)$", re.MULTILINE)
_READY: Final = re.compile(r"listening on ([\d.]+):(\d+), .*metrics (http[^\s,]+)")


def main() -> int:
    """Show each path that works here; return 0 when every digest is equal.

    Raises OSError, naming the step, when one fails or takes too long. Leaves
    no process behind, whatever ends it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same way out as Ctrl-C
    probed = features.all()
    obstacles = {path: str(features.first_obstacle(path, probed) or "") for path in _ACCEL}
    payload = os.urandom(_ROUND_BYTES)
    rows: list[_Row] = []
    with _backend(payload) as backend:
        for path in [path for path, obstacle in obstacles.items() if not obstacle]:
            try:
                rows += _drive(path, backend, memoryview(payload))
            except ChildProcessError as error:
                if path == "relay":
                    raise
                # No probe sees a seccomp filter, or a lockdown.
                obstacles[path] = str(error.strerror)
    is_equal = all(row.moved.is_equal for row in rows)
    click.echo()
    for line in _table(rows):
        click.echo(line)
    click.echo(_LEGEND)
    click.echo("Every digest is equal." if is_equal else "SOME DIGESTS DIFFER: that is a bug.")
    for path, obstacle in obstacles.items():
        if obstacle:
            click.echo(f"\nNot shown: {path}, where the kernel moves the bytes.\n{obstacle}")
    cgroup2 = next(feature for feature in probed if feature.name == "cgroup2")
    click.echo(_NEXT.format(cgroup="/sys/fs/cgroup" if cgroup2.remedy else cgroup2.detail))
    return 0 if is_equal else 1


@dataclass(frozen=True, slots=True)
class _Moved:
    """What a step moved, and what that took."""

    bytes: int
    speed: str
    p50_us: float | None
    wakeups: int
    is_equal: bool

    @classmethod
    def one_by_one(
        cls, size: int, took_s: Sequence[float], wakeups: int, *, is_equal: bool
    ) -> _Moved:
        """Describe a step that did the same thing again and again."""
        speed = f"{len(took_s) / sum(took_s):,.0f}/s"
        return cls(size, speed, statistics.median(took_s) * 1e6, wakeups, is_equal)


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of the table: a step, and the share of its bytes that the kernel moved."""

    path: str
    step: str
    moved: _Moved
    in_kernel: float


def _drive(path: str, backend: str, payload: memoryview) -> Iterator[_Row]:
    """Take one path through every step."""
    with _deadline(f"{path}, start"):
        gateway = _Gateway(backend, _ACCEL[path])
    with contextlib.closing(gateway):
        for name, step in _STEPS.items():
            click.echo(f"{path}: {name}")
            with _deadline(f"{path}, {name}"):
                before = gateway.bytes_by_path()
                moved = step(gateway, payload)
                by_path = gateway.bytes_by_path() - before
            in_kernel = by_path["direct"] + by_path["wire"] + by_path["splice"]
            yield _Row(path, name, moved, in_kernel / (by_path.total() or 1))


@contextlib.contextmanager
def _deadline(what: str) -> Iterator[None]:
    """Name the step in any OSError of the body, and raise one if it takes too long."""

    def expire(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(errno.ETIMEDOUT, f"not done within {_DEADLINE_S} s")

    signal.signal(signal.SIGALRM, expire)
    signal.alarm(_DEADLINE_S)
    try:
        yield
    except OSError as error:
        # OSError() makes the subclass that belongs to the errno.
        raise OSError(error.errno or errno.EIO, f"{what}: {error.strerror or error}") from error
    finally:
        signal.alarm(0)


# --- the gateway, from outside


class _Gateway:
    """A `sockgw run`, its log read and its ports known."""

    def __init__(self, backend: str, accel: str) -> None:
        """Start one and wait until it listens.

        Raises ChildProcessError with its last line when it ends instead.
        """
        options = {
            "--listen": "127.0.0.1:0",
            "--backend": backend,
            "--metrics": "127.0.0.1:0",
            "--accel": accel,
        }
        words = (word for option in options.items() for word in option)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sockgw", "run", *words],
            stderr=subprocess.PIPE,
            text=True,
            env={
                name: value for name, value in os.environ.items() if not name.startswith("SOCKGW_")
            },
        )
        try:
            self._address, self._metrics = self._await_ready()
        except BaseException:
            self.close()
            raise

    def _await_ready(self) -> tuple[tuple[str, int], str]:
        log = self._process.stderr
        assert log  # noqa: S101 -- it is a pipe
        line = ""
        for line in log:
            if match := _READY.search(line.rstrip()):
                # Somebody has to go on reading, or one day the gateway waits for us.
                threading.Thread(target=deque, args=(log, 0), name="demo-log", daemon=True).start()
                return (match[1], int(match[2])), match[3]
        said = line.strip().removeprefix("sockgw: ")
        raise ChildProcessError(errno.ECHILD, said or "the gateway ended without a word")

    def connect(self, service: bytes) -> socket.socket:
        """Open a session and tell the backend what it is for."""
        # With a timeout it is the interpreter that waits, and not recv(): nothing goes
        # direct to who waits in there.
        sock = socket.create_connection(self._address, _DEADLINE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(service)
        return sock

    def wakeups(self) -> int:
        """Return how often its threads have gone to sleep, and so were woken."""
        switches = 0
        for status in Path(f"/proc/{self._process.pid}/task").glob("*/status"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                switches += int(_SWITCHES.findall(status.read_text())[0])
        return switches

    def bytes_by_path(self) -> Counter[str]:
        """Return what it says to have moved so far."""
        with urllib.request.urlopen(self._metrics) as reply:  # noqa: S310 -- from its log
            families = text_string_to_metric_families(reply.read().decode())
        moved = Counter[str]()
        for sample in (sample for family in families for sample in family.samples):
            if sample.name == "gateway_bytes_total":
                moved[sample.labels["path"]] += int(sample.value)
        return moved

    def close(self) -> None:
        """End it, kindly at first."""
        self._process.terminate()
        try:
            self._process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# --- the backend


class _Service(socketserver.BaseRequestHandler):
    """A connection to the backend: its first byte says what for."""

    request: socket.socket
    payload: ClassVar[memoryview]

    def handle(self) -> None:
        """Serve the connection to its end."""
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request.settimeout(_DEADLINE_S)  # as in connect()
        serve = {b"E": self.echo, b"T": self.take, b"G": self.give, b"A": self.answer}
        with contextlib.suppress(ConnectionError, KeyError, TimeoutError):  # the client is gone
            serve[self.request.recv(1)]()

    def echo(self) -> None:
        """Send back each message."""
        message = memoryview(bytearray(_KIB))
        while _receive(self.request, message):
            self.request.sendall(message)

    def take(self) -> None:
        """Receive rounds, with a dot when one is in, and when ready for one."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(_ROUND_BYTES))
        self.request.sendall(b".")
        while count := _receive(self.request, buffer):
            self.request.sendall(b".")
            digest.update(buffer[:count])
            self.request.sendall(b".")
        self.request.sendall(digest.digest())

    def give(self) -> None:
        """Send rounds, each when asked for, with a dot when ready for that."""
        digest, number = hashlib.sha256(), 0
        self.request.sendall(b".")
        while self.request.recv(1):
            _send_round(self.request, self.payload, number)
            _hash_round(digest, self.payload, number)
            number += 1
            self.request.sendall(b".")
        self.request.sendall(digest.digest())

    def answer(self) -> None:
        """Send everything back, but only after the client's half-close."""
        buffer = memoryview(bytearray(2 * _MIB))
        self.request.sendall(buffer[: _receive(self.request, buffer)])


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = _SESSIONS

    def run(self) -> None:
        """Serve, in a process of its own, until that is killed."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to act on
        self.serve_forever()


@contextlib.contextmanager
def _backend(payload: bytes) -> Iterator[str]:
    """Serve from a process of its own: a shared GIL would be measured too."""
    _Service.payload = memoryview(payload)
    with _Server(("127.0.0.1", 0), _Service) as server:
        process = multiprocessing.get_context("fork").Process(target=server.run, daemon=True)
        process.start()
    host, port = server.server_address[:2]
    try:
        yield f"{host!s}:{port}"
    finally:
        process.kill()
        process.join()


# --- the steps: what a client does


def _exchange(gateway: _Gateway, payload: memoryview) -> _Moved:
    """Send the payload in small requests, one at a time, over all sessions in turn."""
    received = memoryview(bytearray(_EXCHANGES * _KIB))
    took_s = list[float]()
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(gateway.connect(b"E")) for _ in range(_SESSIONS)]
        for session in sessions:  # the first exchange is part of opening one
            session.sendall(payload[:_KIB])
            _receive(session, received[:_KIB])
        wakeups = gateway.wakeups()
        end = time.perf_counter() + _STEP_S
        while len(took_s) < _EXCHANGES and (start := time.perf_counter()) < end:
            session = sessions[len(took_s) % _SESSIONS]
            message = slice(len(took_s) * _KIB, (len(took_s) + 1) * _KIB)
            session.sendall(payload[message])
            _receive(session, received[message])
            took_s.append(time.perf_counter() - start)
        wakeups = gateway.wakeups() - wakeups
    size = len(took_s) * _KIB
    is_equal = hashlib.sha256(payload[:size]).digest() == hashlib.sha256(received[:size]).digest()
    return _Moved.one_by_one(2 * size, took_s, wakeups, is_equal=is_equal)


def _half_close(gateway: _Gateway, payload: memoryview) -> _Moved:
    """Send and half-close at once, in session after session; the reply comes after."""
    sent, replied = hashlib.sha256(), hashlib.sha256()
    reply = memoryview(bytearray(2 * _MIB))
    size, took_s = 0, list[float]()
    wakeups = gateway.wakeups()
    for number in range(_HALF_CLOSES):
        request = payload[number * _MIB : (number + 1) * _MIB + number]
        start = time.perf_counter()
        with gateway.connect(b"A") as session:
            session.sendall(request)
            session.shutdown(socket.SHUT_WR)
            count = _receive(session, reply)
        took_s.append(time.perf_counter() - start)
        size += len(request) + count
        sent.update(request)
        replied.update(reply[:count])
    wakeups = gateway.wakeups() - wakeups
    return _Moved.one_by_one(size, took_s, wakeups, is_equal=sent.digest() == replied.digest())


def _upload(gateway: _Gateway, payload: memoryview) -> _Moved:
    """Send a stream to the backend, which says when it has a round."""

    def move(session: socket.socket, number: int, digest: hashlib._Hash) -> float:
        start = time.perf_counter()
        _send_round(session, payload, number)
        _expect_dot(session)
        took_s = time.perf_counter() - start
        _hash_round(digest, payload, number)  # as the backend does meanwhile
        return took_s

    return _bulk(gateway, b"T", move)


def _download(gateway: _Gateway, _payload: memoryview) -> _Moved:
    """Ask the backend for a stream, round by round."""
    buffer = memoryview(bytearray(_ROUND_BYTES))

    def move(session: socket.socket, _number: int, digest: hashlib._Hash) -> float:
        start = time.perf_counter()
        session.sendall(b".")
        count = _receive(session, buffer)
        took_s = time.perf_counter() - start
        digest.update(buffer[:count])  # as the backend does meanwhile
        return took_s

    return _bulk(gateway, b"G", move)


def _bulk(
    gateway: _Gateway, service: bytes, move: Callable[[socket.socket, int, hashlib._Hash], float]
) -> _Moved:
    """Move rounds over one session; the backend's digest follows the half-close."""
    digest, took_s = hashlib.sha256(), list[float]()
    wakeups = gateway.wakeups()
    end = time.perf_counter() + _STEP_S
    with gateway.connect(service) as session:
        _expect_dot(session)
        while len(took_s) < _ROUNDS and time.perf_counter() < end:
            took_s.append(move(session, len(took_s), digest))
            _expect_dot(session)
        session.shutdown(socket.SHUT_WR)
        theirs = bytearray(digest.digest_size)
        _receive(session, memoryview(theirs))
    size = len(took_s) * _ROUND_BYTES
    speed = f"{size * 8 / sum(took_s) / 1e9:.1f} Gbit/s"
    return _Moved(size, speed, None, gateway.wakeups() - wakeups, theirs == digest.digest())


_STEPS: Final[dict[str, Callable[[_Gateway, memoryview], _Moved]]] = {
    "exchanges of 1 KiB": _exchange,
    "bulk to the backend": _upload,
    "bulk to the client": _download,
    "half-close and reply": _half_close,
}


def _send_round(sock: socket.socket, payload: memoryview, number: int) -> None:
    for part in _rotate(payload, number):
        sock.sendall(part)


def _hash_round(digest: hashlib._Hash, payload: memoryview, number: int) -> None:
    for part in _rotate(payload, number):
        digest.update(part)


def _rotate(payload: memoryview, number: int) -> tuple[memoryview, memoryview]:
    """Begin the payload elsewhere: rounds that were alike could be exchanged unseen."""
    cut = number * _MIB
    return payload[cut:], payload[:cut]


def _receive(sock: socket.socket, buffer: memoryview) -> int:
    """Fill the buffer; return less than its length only at the end of the stream.

    Not by MSG_WAITALL: nothing goes direct to who uses it.
    """
    filled = 0
    while filled < len(buffer):
        count = sock.recv_into(buffer[filled:])
        if not count:
            break
        filled += count
    return filled


def _expect_dot(sock: socket.socket) -> None:
    if sock.recv(1) != b".":
        raise ConnectionAbortedError(errno.ECONNABORTED, "the stream ended early")


# --- what is said of it


def _table(rows: Iterable[_Row]) -> Iterator[str]:
    """Yield the table's lines."""
    line = "{:6} {:20} {:>9} {:>11} {:>8} {:>7} {:>6} {}".format
    yield line("path", "what", "moved", "speed", "p50", "wakeups", "kernel", "SHA-256")
    for row in rows:
        moved = row.moved
        yield line(
            row.path,
            row.step,
            f"{moved.bytes / _MIB:,.0f} MiB",
            moved.speed,
            f"{moved.p50_us:,.0f} us" if moved.p50_us else "",
            f"{moved.wakeups:,}",
            f"{row.in_kernel:.1%}",
            "equal" if moved.is_equal else "DIFFERS",
        )


_LEGEND: Final = f"""
Exchanges: one at a time, over {_SESSIONS} sessions in turn. Half-closes: 1 MiB, a session each.
wakeups: of the gateway's threads. kernel: the share of the bytes that only the kernel
touched; on splice, a stream that outruns its receiver is relayed until it pauses. On wire
client and backend speak TCP with each other: the gateway has no socket in it any more. On
direct what one of them sends is put into the other's socket, without TCP.
"""

_NEXT: Final = """
What to try next:
  sockgw check
  sockgw run --listen 127.0.0.1:8080 --backend 127.0.0.1:9000
and, while that runs, as root:
  bpftool prog list | grep sock
  bpftool map dump name sock_pair_map
  bpftool cgroup list {cgroup}
  curl -s http://127.0.0.1:9090/metrics | grep ^gateway_"""
