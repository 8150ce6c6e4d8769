# SPDX-License-Identifier: Apache-2.0
"""Pairing: bytes, FINs and RSTs at every moment of it, and what it costs afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sockgw.errors import DatapathError
from sockgw.session import State, Way

from .pairing import TOO_LONG, kworkers_held, reverse_of

if TYPE_CHECKING:
    from .pairing import Pairing

STEPS = (
    "CHECK",
    "BUFFERS",
    "COOKIES",
    "PAIR_CLIENT",
    "PAIR_BACKEND",
    "SOCK_FIRST",
    "SOCK_SECOND",
    "KICK_FIRST",
    "KICK_SECOND",
)
"""The steps of pairing; `between` is called before each."""
AFTER_THE_MAP = STEPS[STEPS.index("KICK_FIRST") :]


def at(step: str, action: object) -> object:
    """Return what calls `action` before `step`."""

    def between(name: str) -> None:
        if name == f"SGW_STEP_{step}":
            action()

    return between


def test_every_step_is_known(session_pair: Pairing) -> None:
    """The steps that these tests pause at are all there are."""
    seen: list[str] = []
    session_pair.pair(seen.append)
    assert seen == [f"SGW_STEP_{step}" for step in STEPS]


@pytest.mark.parametrize("is_client_first", [False, True], ids=["backend_first", "client_first"])
@pytest.mark.parametrize("step", STEPS)
def test_bytes_at_a_step_arrive_in_order(
    session_pair: Pairing, step: str, is_client_first: bool
) -> None:
    """What both sides send before pairing, at one of its steps and after it arrives in order."""
    for peer in (session_pair.client, session_pair.server):
        peer.send(b"before, ")

    def send() -> None:
        for peer in (session_pair.client, session_pair.server):
            peer.send(b"between, ")

    session_pair.pair(at(step, send), is_client_first=is_client_first)
    for way in Way:  # with nothing behind them that would make the verdict run
        session_pair.expect(way, b"before, between, ")
    for peer in (session_pair.client, session_pair.server):
        peer.send(b"after")
    for way in Way:
        session_pair.expect(way, b"before, between, after")


def test_bytes_at_every_step_arrive_in_order(session_pair: Pairing) -> None:
    """What both sides send before each of the steps arrives in order."""

    def send(step: str) -> None:
        for peer in (session_pair.client, session_pair.server):
            peer.send(step.encode())

    session_pair.pair(send)
    for way in Way:
        session_pair.expect(way, "".join(f"SGW_STEP_{step}" for step in STEPS).encode())


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("last", [b"", b"with the FIN"], ids=["bare", "with_bytes"])
def test_fin_at_a_step_comes_after_the_bytes(
    session_pair: Pairing, way: Way, step: str, last: bytes
) -> None:
    """A FIN at any step, with bytes in its segment or without, is passed on behind the bytes."""
    sender, answerer = session_pair.ends(way)
    sender.send(b"before, ")
    try:
        session_pair.pair(at(step, lambda: sender.finish(last)))
    except DatapathError:
        session_pair.relay()
    session_pair.expect(way, b"before, " + last)
    session_pair.expect_eof(way)
    assert session_pair.direction(way).state is State.ENDED
    # The other direction is as open as it was.
    reverse = reverse_of(way)
    answerer.send(b"answer, ")
    session_pair.expect(reverse, b"answer, ")
    answerer.finish(b"and its end")
    session_pair.expect(reverse, b"answer, and its end")
    session_pair.expect_eof(reverse)


@pytest.mark.parametrize("last", [b"", b"with the FIN"], ids=["bare", "with_bytes"])
def test_fin_after_pairing_comes_after_the_bytes(
    session_pair: Pairing, way: Way, last: bytes
) -> None:
    """A FIN on a spliced direction is passed on behind the redirected bytes."""
    session_pair.pair()
    sender, answerer = session_pair.ends(way)
    sender.send(b"request, ")
    sender.finish(last)
    session_pair.expect(way, b"request, " + last)
    session_pair.expect_eof(way)
    answerer.send(b"answer")
    answerer.finish()
    reverse = reverse_of(way)
    session_pair.expect(reverse, b"answer")
    session_pair.expect_eof(reverse)
    assert session_pair.pairs.to_backend.passed == session_pair.pairs.to_client.passed == 0


@pytest.mark.parametrize("step", STEPS)
def test_reset_at_a_step_is_seen(session_pair: Pairing, way: Way, step: str) -> None:
    """A RST at any step is refused by the kernel or seen afterwards, never missed."""
    sender, _ = session_pair.ends(way)
    sender.send(b"before")
    try:
        session_pair.pair(at(step, sender.reset))
    except DatapathError:
        assert step not in AFTER_THE_MAP
        session_pair.relay()
    session_pair.until(lambda: session_pair.losses, "the RST is seen")
    assert {lost for lost, _ in session_pair.losses} == {way}


def test_redirected_bytes_need_no_help(session_pair: Pairing, way: Way) -> None:
    """On a spliced direction the bytes arrive while userspace does nothing at all."""
    session_pair.pair()
    sender, receiver = session_pair.ends(way)
    slot = session_pair.direction(way).splice.slot
    for number in range(1, 101):
        sender.send(b"%999d\n" % number)
        session_pair.drained(way)
        receiver.read()
    assert bytes(receiver.received) == b"".join(b"%999d\n" % n for n in range(1, 101))
    assert (slot.redirected, slot.passed) == (100_000, 0)
    assert session_pair.direction(way).relay.taken == 0
    assert session_pair.datapath.spills(session_pair.worker) == []


@pytest.mark.parametrize("is_answered", [True, False], ids=["behind_an_answer", "alone"])
def test_bare_fin_leaves_the_sockets_alone(
    session_pair: Pairing, way: Way, is_answered: bool
) -> None:
    """A bare FIN is neither sent to the target nor left on the source: both work as before.

    Either would break the socket that it is queued on: a kworker takes the
    0 bytes that it sends or queues for a failure, and reports EPIPE.
    """
    session_pair.pair()
    sender, answerer = session_pair.ends(way)
    reverse = reverse_of(way)
    answer = b"an answer, " if is_answered else b""
    with kworkers_held():
        sender.send(b"request")
        if answer:
            answerer.send(answer)
        sender.finish()
    session_pair.expect(way, b"request")
    session_pair.expect_eof(way)
    answerer.send(b"a" * 100_000)
    session_pair.expect(reverse, answer + b"a" * 100_000)
    slot = session_pair.direction(reverse).splice.slot
    assert (slot.redirected, slot.passed) == (len(answer) + 100_000, 0)
    # What is passed to userspace on the socket that the FIN was meant for, too.
    session_pair.narrow(reverse)
    answerer.finish(TOO_LONG)
    session_pair.expect(reverse, answer + b"a" * 100_000 + TOO_LONG)
    session_pair.expect_eof(reverse)
    assert session_pair.losses == []
