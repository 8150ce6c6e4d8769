# SPDX-License-Identifier: Apache-2.0
"""The things that kernel tests are about: a datapath, and sessions on it."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from sockgw._bpf import features
from sockgw.session import Path, Way

from .leftovers import held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sockgw.datapath import Datapath

    from .pairing import Pairing

WORKERS = 2


@pytest.fixture(scope="session")
def _splice_works() -> None:
    """Skip where this host cannot splice, for the reason that `sockgw check` gives."""
    obstacle = features.first_obstacle(Path.SPLICE.value, features.all(None))
    if obstacle is not None:
        pytest.skip(str(obstacle))


@pytest.fixture(scope="session")
def _wire_works() -> None:
    """Skip where this host has no wire path, for the reason that `sockgw check` gives."""
    obstacle = features.first_obstacle("wire", features.all(None))
    if obstacle is not None:
        pytest.skip(str(obstacle))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fail if the test leaves a descriptor or a BPF object behind."""
    before = held()
    yield
    assert held() == before


@pytest.fixture(scope="session")
def datapath(_splice_works: None) -> Iterator[Datapath]:
    """A loaded datapath of two workers, without sockops.

    All tests share it, so that nearly every session has slots that another
    one had before.
    """
    from sockgw.datapath import Datapath  # noqa: PLC0415 - there is none without the binding

    loaded = Datapath.load(sessions=4, workers=WORKERS, cgroup=None)
    yield loaded
    loaded.close()


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def family(request: pytest.FixtureRequest) -> socket.AddressFamily:
    """Each address family in turn."""
    found: socket.AddressFamily = request.param
    return found


@pytest.fixture(params=list(Way), ids=lambda way: way.value)
def way(request: pytest.FixtureRequest) -> Way:
    """Each direction in turn."""
    found: Way = request.param
    return found


@pytest.fixture
def session_pairs(
    datapath: Datapath, family: socket.AddressFamily
) -> Iterator[Callable[[], Pairing]]:
    """Make sessions that are not yet paired, and close them after the test."""
    from .pairing import Pairing  # noqa: PLC0415 - as above

    made: list[Pairing] = []
    for worker in range(WORKERS):
        datapath.spills(worker)  # announced in the test before

    def make() -> Pairing:
        made.append(Pairing(datapath, family))
        return made[-1]

    yield make
    for pairing in made:
        pairing.close()


@pytest.fixture
def session_pair(session_pairs: Callable[[], Pairing]) -> Pairing:
    """A session that is not yet paired."""
    return session_pairs()
