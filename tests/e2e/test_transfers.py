# SPDX-License-Identifier: Apache-2.0
"""Transfers: every byte arrives, in order, both ways, and so does the end.

SOCKGW_TEST_SEED=N repeats a random run; SOCKGW_TEST_SECONDS=N goes on for N seconds.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from .plans import Run, serve
from .traffic import GIB, MIB, Stream, Task, expect, random_seed, receive, send_and_finish
from .waits import DEADLINE_S

if TYPE_CHECKING:
    from .conftest import OpenSession, StartGateway
    from .paths import PathUnderTest
    from .peers import Backend

SESSIONS = 160
AT_ONCE = 16
SECONDS = float(os.environ.get("SOCKGW_TEST_SECONDS") or 0)


@pytest.mark.timeout(240 + SECONDS)
def test_random_transfers(gateway: StartGateway, path: PathUnderTest, backend: Backend) -> None:
    """What either side sends arrives whole and in order, then its end does, whatever the pace."""
    seed = random_seed()
    end = time.monotonic() + SECONDS
    running = gateway(backend.address)
    run = Run(seed)
    enough = threading.Event()
    serving = Task(serve, backend, run, enough)
    sessions = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while sessions < SESSIONS or time.monotonic() < end:
            numbers = range(sessions, sessions + SESSIONS)
            list(pool.map(lambda number: run.client(running.address, number), numbers))
            sessions += SESSIONS
            if run.failures:
                break
    enough.set()
    serving.result(3 * DEADLINE_S)
    to_backend, to_client = run.check(sessions)

    lines = running.access_lines(sessions)
    assert len(lines) == sessions
    assert {line["end"] for line in lines} == {"eof"}
    assert sum(line.bytes("to_backend") for line in lines) == to_backend
    assert sum(line.bytes("to_client") for line in lines) == to_client
    metrics = running.metrics()
    if path.in_kernel:
        spliced = metrics.value("gateway_bytes_total", path=path.label)
        assert spliced > (to_backend + to_client) / 10, "hardly a byte stayed in the kernel"
    elif path.label == "wire":
        wired = metrics.value("gateway_bytes_total", path="wire")
        assert wired > (to_backend + to_client) / 10, "hardly a byte went by wire"
    else:
        assert metrics.value("gateway_bytes_total", path="relay") == to_backend + to_client
        assert metrics.value("gateway_ebpf_redirects_total") == 0


def test_two_gateways_in_a_row(gateway: StartGateway, backend: Backend) -> None:
    """A gateway may have another one as its backend."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")  # noqa: T201 - shown when the test fails
    second = gateway(backend.address)
    first = gateway(second.address)
    run = Run(seed, longest=8 * MIB)
    enough = threading.Event()
    serving = Task(serve, backend, run, enough)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda number: run.client(first.address, number), range(48)))
    enough.set()
    serving.result(3 * DEADLINE_S)
    run.check(48)


@pytest.mark.parametrize("length", [0, 1, 2, 1459, 1460, 1461, 65535, 65536, 65537, 5 * MIB])
def test_each_length_in_each_direction(
    gateway: StartGateway, backend: Backend, session: OpenSession, length: int
) -> None:
    """A stream of any length arrives with its end, in both directions at once."""
    client, server = session(gateway(backend.address), backend)
    up, down = Stream(1, length), Stream(2, length)
    tasks = [
        Task(send_and_finish, client, up),
        Task(send_and_finish, server, down),
    ]
    at_client = Task(receive, client)
    assert receive(server) == up.receipt()
    assert at_client.result() == down.receipt()
    for task in tasks:
        task.result()


def test_small_messages_are_not_held_back(
    gateway: StartGateway, backend: Backend, session: OpenSession
) -> None:
    """A request in two small writes is not delayed by Nagle's algorithm on the way."""
    client, server = session(gateway(backend.address), backend)
    begun = time.monotonic()
    for _ in range(50):
        client.sendall(b"head")
        client.sendall(b"body")
        expect(server, b"headbody")
        server.sendall(b"status")
        server.sendall(b"answer")
        expect(client, b"statusanswer")
    # Held back, each of the hundred messages would take a delayed ACK: 40 ms.
    assert time.monotonic() - begun < 1.0


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("direction", ["to_backend", "to_client"])
def test_more_than_4_gib_in_one_stream(
    gateway: StartGateway, backend: Backend, session: OpenSession, direction: str
) -> None:
    """One stream longer than any 32-bit counter arrives whole."""
    client, server = session(gateway(backend.address), backend)
    sender, receiver = (client, server) if direction == "to_backend" else (server, client)
    stream = Stream(1, 4 * GIB + 300 * MIB + 17)
    sending = Task(send_and_finish, sender, stream)
    receipt = receive(receiver)
    sending.result()
    assert receipt == stream.receipt()
    receiver.shutdown(socket.SHUT_WR)
    assert sender.recv(1) == b""
