# SPDX-License-Identifier: Apache-2.0
"""Random two-way transfers: drawn from a seed, followed by both sides, compared by digest.

Each side of each session follows a plan of its own: how much it sends, in what
pieces, with what pauses, how it reads and when it half-closes. Both sides send
a numbered stream, so that a session can be told by its digests alone.
"""

from __future__ import annotations

import random
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .peers import Backend, connect
from .traffic import KIB, MIB, Receipt, Stream, Task, pause, receive, send

if TYPE_CHECKING:
    from collections.abc import Iterator

PACED_S = 0.6  # what one side's pauses may add up to, for each way it reads or writes
_CHUNKS = ("whole", "medium", "tiny", "mixed")
_READERS = ("eager", "eager", "slow", "bursty", "late", "narrow")


@dataclass(frozen=True)
class Plan:
    """What one side of a session does."""

    stream: Stream
    seed: int
    chunks: str
    start_s: float  # its first byte is sent that long after the connection
    pauses: int
    reader: str
    finish_first: bool  # half-close at once; otherwise only after the peer's EOF

    @classmethod
    def draw(cls, number: int, seed: int, longest: int) -> Plan:
        """Draw the plan `number` of a run."""
        rng = random.Random(f"{seed}:{number}")
        length = min(longest, _draw_length(rng))
        return cls(
            stream=Stream(number, length),
            seed=rng.getrandbits(32),
            chunks=rng.choice(_CHUNKS),
            start_s=rng.choice((0.0, 0.0, rng.random() * 0.05, rng.random() * 0.3)),
            pauses=rng.choice((0, 0, 1, 5, 40)),
            reader=rng.choice(_READERS),
            finish_first=rng.random() < 0.7,
        )

    def piece_sizes(self) -> Iterator[int]:
        """Yield the sizes of the pieces it sends, 1 byte to 1 MiB."""
        rng = random.Random(self.seed)
        # Small pieces of a long stream would take minutes of system calls.
        smallest = max(1, self.stream.length // 4000)
        while True:
            if self.chunks == "whole":
                yield MIB
            elif self.chunks == "medium":
                yield max(smallest, rng.randint(1, 64 * KIB))
            elif self.chunks == "tiny":
                yield max(smallest, rng.randint(1, 16))
            else:
                yield max(smallest, int(2 ** rng.uniform(0, 20)))


def _draw_length(rng: random.Random) -> int:
    """Draw 0 bytes to 64 MiB, most of them short."""
    kind = rng.random()
    if kind < 0.08:
        return 0
    if kind < 0.35:
        return rng.randint(1, 2 * KIB)
    if kind < 0.65:
        return rng.randint(1, 256 * KIB)
    if kind < 0.93:
        return rng.randint(1, 3 * MIB)
    if kind < 0.985:
        return rng.randint(3 * MIB, 16 * MIB)
    return rng.randint(16 * MIB, 64 * MIB)


def _write(sock: socket.socket, plan: Plan, peer_finished: threading.Event) -> None:
    rng = random.Random(plan.seed + 1)
    pause(plan.start_s)
    pieces = 4 + plan.stream.length // (32 * KIB)
    chance = plan.pauses / pieces
    left_s = PACED_S

    def sometimes_pause() -> None:
        nonlocal left_s
        if left_s > 0 and rng.random() < chance:
            seconds = min(left_s, rng.random() * 0.1)
            left_s -= seconds
            pause(seconds)

    send(sock, plan.stream, chunks=plan.piece_sizes(), before_each=sometimes_pause)
    if not plan.finish_first:
        # If both wait for the other, the one that read everything else first
        # gives up waiting: a side that half-closes second is drawn, not fixed.
        peer_finished.wait(0.2)
    sock.shutdown(socket.SHUT_WR)


def _read(sock: socket.socket, plan: Plan, peer_finished: threading.Event) -> Receipt:
    rng = random.Random(plan.seed + 2)
    left_s = PACED_S
    resume_at = 0

    def pace(length: int) -> None:
        nonlocal left_s, resume_at
        if left_s <= 0:
            return
        seconds = 0.0
        if plan.reader == "late" and length == 0:
            seconds = PACED_S
        elif plan.reader in {"slow", "narrow"}:
            seconds = rng.random() * 0.01
        elif plan.reader == "bursty" and length >= resume_at:
            seconds = 0.05 + rng.random() * 0.15
            resume_at = length + rng.randint(1, 512 * KIB)
        if seconds:
            seconds = min(left_s, seconds)
            left_s -= seconds
            pause(seconds)

    def sizes() -> Iterator[int]:
        while True:
            if plan.reader == "slow" and left_s > 0:
                yield rng.randint(1, 64 * KIB)
            else:
                yield 256 * KIB

    receipt = receive(sock, sizes=sizes(), before_each=pace)
    peer_finished.set()
    return receipt


def _run(sock: socket.socket, plan: Plan) -> Receipt:
    """Follow `plan` on a connected socket; return what came from the other side."""
    if plan.chunks != "medium":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer_finished = threading.Event()
    writing = Task(_write, sock, plan, peer_finished)
    try:
        receipt = _read(sock, plan, peer_finished)
        writing.result()
    finally:
        sock.close()
    return receipt


class Run:
    """All sessions of one run, the backend's half of each included."""

    def __init__(self, seed: int, *, longest: int = 64 * MIB) -> None:
        """Prepare a run whose streams have up to `longest` bytes."""
        self.seed = seed
        self.longest = longest
        self.received_by_clients: dict[int, Receipt] = {}
        self.received_by_servers: dict[int, Receipt] = {}
        self.failures: list[str] = []

    def plan(self, number: int) -> Plan:
        """Return plan `number`: even ones are clients', odd ones backends'."""
        return Plan.draw(number, self.seed, self.longest)

    def client(self, address: str, number: int) -> None:
        """Be the client of session `number`."""
        narrow = self.plan(2 * number).reader == "narrow"
        # Before the connection is made: a window that shrinks later makes the
        # peer's kernel wait 200 ms for each next piece, proxy or not.
        sock = connect(address, receive_buffer_bytes=32 * KIB if narrow else None)
        self._follow(sock, 2 * number, self.received_by_clients)

    def server(self, sock: socket.socket, number: int) -> None:
        """Be the backend of the session that was accepted as the `number`th."""
        self._follow(sock, 2 * number + 1, self.received_by_servers)

    def _follow(self, sock: socket.socket, number: int, received: dict[int, Receipt]) -> None:
        try:
            received[number] = _run(sock, self.plan(number))
        except (AssertionError, OSError) as error:
            self.failures.append(f"{self.plan(number)}: {error!r}")

    def check(self, sessions: int) -> tuple[int, int]:
        """Compare what was sent with what came; return the bytes of both directions."""
        dialled = len(self.received_by_servers) + len(self.failures)
        assert not self.failures, f"{dialled} dialled for {sessions}: {self.failures}"
        by_client = [self.plan(2 * n).stream for n in range(sessions)]
        by_server = [self.plan(2 * n + 1).stream for n in range(sessions)]
        from_server = self._match("to_client", by_server, self.received_by_clients)
        from_client = self._match("to_backend", by_client, self.received_by_servers)
        # Which server's stream a client got must be who got the client's.
        crossed = [
            (client, server)
            for client, server in from_server.items()
            if server in from_client and from_client[server] != client
        ]
        assert not crossed, f"sessions mixed up: {crossed}"
        return sum(s.length for s in by_client), sum(s.length for s in by_server)

    @staticmethod
    def _match(direction: str, sent: list[Stream], received: dict[int, Receipt]) -> dict[int, int]:
        """Match receipts with streams; return receiver -> sender where only one can be meant."""
        assert len(received) == len(sent), f"{direction}: {len(received)} ends for {len(sent)}"
        # Streams of no or few bytes may be equal: which one came cannot be told.
        expected: dict[Receipt, list[Stream]] = {}
        for stream in sent:
            expected.setdefault(stream.receipt(), []).append(stream)
        unique = {receipt for receipt, streams in expected.items() if len(streams) == 1}
        sender_of: dict[int, int] = {}
        wrong = []
        for receiver, receipt in received.items():
            candidates = expected.get(receipt)
            if not candidates:
                wrong.append((receiver, receipt))
                continue
            stream = candidates.pop()
            if receipt in unique:
                sender_of[receiver] = stream.number
        missing = [(s.number, s.length) for streams in expected.values() for s in streams]
        assert not wrong, f"{direction}: {wrong} match none of the streams sent: {missing}"
        assert not missing, f"{direction}: never arrived: {missing}"
        return sender_of


def serve(backend: Backend, run: Run, enough: threading.Event) -> None:
    """Accept sessions and follow the next plan on each."""
    threads: list[Task[None]] = []
    while not enough.is_set():
        try:
            sock = backend.accept(within_s=0.2)
        except TimeoutError:
            continue
        threads.append(Task(run.server, sock, len(threads)))
    for thread in threads:
        thread.result()
