# SPDX-License-Identifier: Apache-2.0
"""Order at each change of a direction's owner: spill, return, and the end.

Bytes that the verdict has redirected are kept in the target's backlog
(`kworkers_held`) while userspace is tempted to overtake them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sockgw.datapath import Slot
from sockgw.session import State, Way

from .pairing import TOO_LONG, kworkers_held, reverse_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from .pairing import Pairing

TURNS = 10


def turns(session_pair: Pairing, way: Way) -> bytes:
    """Take a few turns; return what has arrived at the end of `way`."""
    _, receiver = session_pair.ends(way)
    for _ in range(TURNS):
        session_pair.turn()
        receiver.read()
    return bytes(receiver.received)


def test_copy_waits_for_what_was_redirected(session_pair: Pairing, way: Way) -> None:
    """Bytes that spill are copied only when those redirected before them have left."""
    session_pair.pair()
    direction = session_pair.direction(way)
    sender, _ = session_pair.ends(way)
    with kworkers_held():
        sender.send(b"redirected, ")
        session_pair.narrow(way)
        sender.send(TOO_LONG)
        slot = direction.splice.slot
        assert (slot.redirected, slot.passed) == (len(b"redirected, "), len(TOO_LONG))
        assert turns(session_pair, way) == b""
        assert direction.state is State.SPILLING
        assert not direction.splice.is_flushed()
        assert direction.splice.outstanding() == len(b"redirected, ")
    session_pair.expect(way, b"redirected, " + TOO_LONG)
    session_pair.settle(way)
    assert direction.spills == session_pair.tally.spills[way.value] == 1


def test_everything_passes_until_the_copy_has_caught_up(session_pair: Pairing, way: Way) -> None:
    """Once a segment was passed, short ones that would fit are passed behind it."""
    session_pair.pair()
    sender, _ = session_pair.ends(way)
    slot = session_pair.direction(way).splice.slot
    session_pair.narrow(way)
    sender.send(TOO_LONG)
    session_pair.widen(way)
    sender.send(b" and a short one")
    assert (slot.redirected, slot.passed) == (0, len(TOO_LONG) + len(b" and a short one"))
    session_pair.expect(way, TOO_LONG + b" and a short one")
    session_pair.settle(way)
    sender.send(b", redirected again")
    session_pair.expect(way, TOO_LONG + b" and a short one, redirected again")
    assert slot.redirected == len(b", redirected again")


def spilled(session_pair: Pairing, way: Way) -> None:
    """Pair, and bring the direction to where it has copied all and is about to let go."""
    session_pair.pair()
    sender, receiver = session_pair.ends(way)
    session_pair.narrow(way)
    sender.send(TOO_LONG)
    session_pair.widen(way)
    session_pair.hear()
    receiver.read()


def release_with(
    monkeypatch: pytest.MonkeyPatch,
    *,
    before: Callable[[], None] = lambda: None,
    between: Callable[[], None] = lambda: None,
) -> list[bool]:
    """Make the next Slot.release pause before it lets go, and before it looks.

    Returns a list to which its answer will be added.
    """
    answers: list[bool] = []
    real = Slot.release

    def release(slot: Slot) -> bool:
        if answers:
            return real(slot)
        before()
        slot._words.hold = 0
        between()
        answers.append(real(slot))
        return answers[0]

    monkeypatch.setattr(Slot, "release", release)
    return answers


def test_bytes_before_letting_go_are_copied(
    session_pair: Pairing, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is passed after the last read and before the return is not announced, and not lost."""
    sender, _ = session_pair.ends(way)
    answers = release_with(monkeypatch, before=lambda: sender.send(b", passed in silence"))
    spilled(session_pair, way)
    session_pair.expect(way, TOO_LONG + b", passed in silence")
    session_pair.settle(way)
    assert answers == [False]
    assert session_pair.direction(way).spills == 1


def test_bytes_after_letting_go_are_redirected(
    session_pair: Pairing, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What arrives between the two halves of the return is redirected behind the copy."""
    sender, _ = session_pair.ends(way)
    answers = release_with(monkeypatch, between=lambda: sender.send(b", redirected"))
    spilled(session_pair, way)
    session_pair.expect(way, TOO_LONG + b", redirected")
    assert answers == [True]
    assert session_pair.direction(way).splice.slot.redirected == len(b", redirected")
    assert session_pair.direction(way).state is State.SPLICED


def test_spill_in_the_middle_of_the_return_keeps_its_place(
    session_pair: Pairing, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes redirected and then passed between the two halves of the return arrive in order."""
    sender, _ = session_pair.ends(way)
    direction = session_pair.direction(way)

    def redirect_and_pass() -> None:
        sender.send(b", redirected, ")
        session_pair.narrow(way)
        sender.send(TOO_LONG)
        session_pair.widen(way)

    answers = release_with(monkeypatch, between=redirect_and_pass)
    with kworkers_held():
        spilled(session_pair, way)
        assert turns(session_pair, way) == TOO_LONG
        assert answers == [False]
        assert direction.state is State.SPILLING
        assert direction.relay.is_holding
        assert direction.splice.outstanding() == len(b", redirected, ")
    session_pair.expect(way, TOO_LONG + b", redirected, " + TOO_LONG)
    session_pair.settle(way)


def test_spill_right_after_the_return_is_announced(session_pair: Pairing, way: Way) -> None:
    """A direction that has returned hears of its next spill."""
    spilled(session_pair, way)
    session_pair.settle(way)
    sender, _ = session_pair.ends(way)
    session_pair.narrow(way)
    sender.send(TOO_LONG)
    session_pair.expect(way, TOO_LONG + TOO_LONG)
    assert session_pair.direction(way).spills == 2


def test_fin_waits_for_what_was_redirected(session_pair: Pairing, way: Way) -> None:
    """A FIN is passed on only when every redirected byte has left."""
    session_pair.pair()
    sender, receiver = session_pair.ends(way)
    with kworkers_held():
        sender.send(b"redirected, ")
        sender.finish(b"the last")
        assert turns(session_pair, way) == b""
        assert session_pair.direction(way).state is State.ENDING
        assert not receiver.has_seen_eof
    session_pair.expect(way, b"redirected, the last")
    session_pair.expect_eof(way)


@pytest.mark.parametrize("is_heard", [True, False], ids=["spill_first", "fin_first"])
def test_fin_waits_for_what_was_passed(session_pair: Pairing, way: Way, is_heard: bool) -> None:
    """A FIN behind passed bytes comes after them, whichever of the two is heard of first."""
    session_pair.pair()
    sender, _ = session_pair.ends(way)
    session_pair.narrow(way)
    sender.finish(TOO_LONG)
    assert session_pair.direction(way).splice.slot.passed == len(TOO_LONG)
    if is_heard:
        session_pair.hear()
    else:
        session_pair.direction(way).saw_fin()
    session_pair.expect(way, TOO_LONG)
    session_pair.expect_eof(way)


def test_fin_during_the_return_is_passed_on(
    session_pair: Pairing, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A FIN that arrives while userspace lets go is passed on."""
    sender, _ = session_pair.ends(way)
    answers = release_with(monkeypatch, between=lambda: sender.finish(b", the last"))
    spilled(session_pair, way)
    session_pair.expect(way, TOO_LONG + b", the last")
    session_pair.expect_eof(way)
    assert answers == [True]


def test_passed_bytes_of_one_direction_make_the_other_pass(session_pair: Pairing, way: Way) -> None:
    """While userspace owes one direction bytes, the reverse passes too, and both arrive."""
    session_pair.pair()
    reverse = reverse_of(way)
    sender, answerer = session_pair.ends(way)
    session_pair.narrow(reverse)
    answerer.send(TOO_LONG)
    assert session_pair.direction(reverse).splice.slot.passed == len(TOO_LONG)
    sender.send(b"short")
    slot = session_pair.direction(way).splice.slot
    assert (slot.redirected, slot.passed) == (0, len(b"short"))
    session_pair.expect(way, b"short")
    session_pair.expect(reverse, TOO_LONG)
    session_pair.settle(way)
    session_pair.settle(reverse)
    sender.send(b", redirected")
    session_pair.expect(way, b"short, redirected")
    assert slot.redirected == len(b", redirected")


def test_end_that_recv_tells_too_early_is_not_believed(session_pair: Pairing, way: Way) -> None:
    """Bytes passed behind the reverse's backlog are not cut off by recv()'s early 0."""
    session_pair.pair()
    reverse = reverse_of(way)
    direction = session_pair.direction(way)
    sender, answerer = session_pair.ends(way)
    session_pair.narrow(way)
    with kworkers_held():
        # The backlog of `reverse` is on the socket that `way` reads.
        answerer.send(b"answer")
        sender.finish(TOO_LONG)
        assert session_pair.direction(reverse).splice.outstanding() == len(b"answer")
        assert direction.relay.source.recv(1) == b"", "this kernel does not tell it too early"
        assert turns(session_pair, way) == b""
        assert direction.state is State.COPYING
        assert direction.splice.unread == len(TOO_LONG)
    session_pair.expect(way, TOO_LONG)
    session_pair.expect_eof(way)
    session_pair.expect(reverse, b"answer")
