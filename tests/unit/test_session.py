# SPDX-License-Identifier: Apache-2.0
"""The session machine's table, by itself: what holds for every path through it."""

from __future__ import annotations

import pytest

from sockgw.session import TABLE, Action, Event, State

EVERYWHERE = (Event.FIN, Event.SPILLED)
"""They come when they come; the other events answer what the state asked."""


def reachable(start: State) -> set[State]:
    """Return the states that can follow `start`, itself included."""
    found, new = set(), {start}
    while new:
        found |= new
        new = {after for (before, _), (after, _) in TABLE.items() if before in new} - found
    return found


def test_every_state_is_reached() -> None:
    """A direction begins WAITING, and can come to every state from there."""
    assert reachable(State.WAITING) == set(State)


@pytest.mark.parametrize("state", State)
def test_every_state_can_end(state: State) -> None:
    """Wherever a direction is, there is a way to its end."""
    assert State.ENDED in reachable(state)


def test_nothing_follows_the_end() -> None:
    """A direction that has ended stays so, and does nothing more."""
    after = {outcome for (state, _), outcome in TABLE.items() if state is State.ENDED}
    assert after == {(State.ENDED, Action.NOTHING)}


@pytest.mark.parametrize("state", [state for state in State if state is not State.WAITING])
@pytest.mark.parametrize("event", EVERYWHERE)
def test_what_comes_by_itself_is_expected_everywhere(state: State, event: Event) -> None:
    """A FIN or a spill may be heard of in every state that has a target."""
    assert (state, event) in TABLE


def test_only_a_flush_opens_the_way_to_userspace() -> None:
    """The kernel's bytes are never overtaken: the copy begins behind a flush, or at the start."""
    copies = {key for key, (_, action) in TABLE.items() if action is Action.COPY}
    assert copies == {(State.SPILLING, Event.FLUSHED), (State.WAITING, Event.CONNECTED)}


def test_only_a_flush_passes_the_fin_on() -> None:
    """A FIN is passed on from ENDING only, and only behind a flush."""
    shuts = {key: after for key, (after, action) in TABLE.items() if action is Action.SHUT}
    assert shuts == {(State.ENDING, Event.FLUSHED): State.ENDED}
    ends = {before for (before, _), (after, _) in TABLE.items() if after is State.ENDED}
    assert ends == {State.ENDING, State.ENDED}


def test_the_kernel_takes_over_from_a_copy_that_let_go() -> None:
    """Splice follows pairing, or a copy that has forwarded everything and let go."""
    spliced = {key for key, (after, _) in TABLE.items() if after is State.SPLICED}
    assert spliced == {
        (State.WAITING, Event.PAIRED),
        (State.COPYING, Event.PAIRED),
        (State.COPYING, Event.RETURNED),
    }


def test_a_flush_is_waited_for_where_one_is_begun() -> None:
    """The states that a flush leads to are those that its end leads out of."""
    begun = {after for after, action in TABLE.values() if action is Action.FLUSH}
    ended = {state for state, event in TABLE if event is Event.FLUSHED}
    assert begun == ended == {State.SPILLING, State.ENDING}


def test_an_event_that_says_nothing_changes_nothing() -> None:
    """NOTHING leaves the state as it is, and every action but it is a step."""
    for (before, _), (after, action) in TABLE.items():
        assert (action is Action.NOTHING) == (before is after)
