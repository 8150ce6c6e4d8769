# SPDX-License-Identifier: Apache-2.0
"""Over links that are slow and lose packets: client, gateway and backend in three namespaces.

On loopback a segment is 64 KiB and none is ever lost. Here it is 1500 bytes,
queues overflow, and segments come late, twice and out of order.
"""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from .network import Network, network
from .peers import Backend, connect, is_reset, join_address, reset
from .plans import Run, serve
from .traffic import (
    MIB,
    Stream,
    Task,
    exchange,
    receive,
    send_and_finish,
    send_until_stalled,
)
from .waits import DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import StartGateway
    from .gateways import Gateway
    from .paths import PathUnderTest

pytestmark = pytest.mark.usefixtures("root")

SESSIONS = 48
LISTEN = join_address(Network.GATEWAY_SEEN_BY_CLIENT, 0)


@pytest.fixture
def machines() -> Iterator[Network]:
    """Make three machines with links between them."""
    with network() as made:
        yield made


@pytest.fixture
def far_backend(machines: Network) -> Iterator[Backend]:
    """Listen on the backend's machine."""
    with machines.backend.run(Backend, Network.BACKEND) as backend:
        yield backend


@pytest.fixture
def between(machines: Network, gateway: StartGateway, far_backend: Backend) -> Gateway:
    """Run a gateway on the machine in the middle."""
    return gateway(far_backend.address, netns=machines.gateway, listen=LISTEN)


def test_random_transfers_over_lossy_links(
    machines: Network, between: Gateway, path: PathUnderTest, far_backend: Backend
) -> None:
    """What is sent over links that lose packets arrives whole, in order, with its end."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")  # noqa: T201 - shown when the test fails
    run = Run(seed, longest=6 * MIB)
    enough = threading.Event()
    serving = Task(serve, far_backend, run, enough)
    with ThreadPoolExecutor(16, initializer=machines.client.enter) as pool:
        list(pool.map(lambda number: run.client(between.address, number), range(SESSIONS)))
    enough.set()
    serving.result(3 * DEADLINE_S)
    to_backend, to_client = run.check(SESSIONS)
    lines = between.access_lines(SESSIONS)
    assert {line["end"] for line in lines} == {"eof"}
    assert sum(line.bytes("to_backend") for line in lines) == to_backend
    assert sum(line.bytes("to_client") for line in lines) == to_client
    if path.in_kernel:
        assert between.metrics().value("gateway_bytes_total", path=path.label) > 0
        # Losses are seen by the program that follows our sockets.
        assert sum(int(line["client_retransmits"]) for line in lines) > 0


@pytest.mark.parametrize("direction", ["to_backend", "to_client"])
def test_stall_over_a_slow_link(
    machines: Network, between: Gateway, far_backend: Backend, direction: str
) -> None:
    """A receiver that stalls behind a slow link gets every byte when it reads again."""
    client = machines.client.run(connect, between.address)
    server = far_backend.accept()
    exchange(client, server)
    sender, receiver = (client, server) if direction == "to_backend" else (server, client)
    stream = Stream(1, 128 * MIB)
    sent = send_until_stalled(sender, stream)
    assert sent < 32 * MIB
    sender.shutdown(1)
    assert receive(receiver) == stream.receipt_of(sent)


def test_half_close_and_reset_over_a_slow_link(
    machines: Network, between: Gateway, far_backend: Backend
) -> None:
    """FIN comes after the last byte, and RST is passed on, over links with losses too."""
    for number in range(4):
        client = machines.client.run(connect, between.address)
        server = far_backend.accept()
        stream = Stream(number, 4 * MIB)
        sending = Task(send_and_finish, client, stream)
        assert receive(server) == stream.receipt()
        sending.result()
        sending = Task(send_and_finish, server, stream)
        assert receive(client) == stream.receipt()
        sending.result()
        client.close()
        server.close()
    client = machines.client.run(connect, between.address)
    server = far_backend.accept()
    exchange(client, server)
    reset(server)
    assert is_reset(client, within_s=1.0)
    client.close()
