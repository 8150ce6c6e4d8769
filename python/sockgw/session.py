# SPDX-License-Identifier: Apache-2.0
"""The session machine: what a direction does next, and nothing of how.

Pure: no socket, no map, no clock. `sockgw.direction` feeds it with what it
sees on real sockets and carries out the actions.

The theory
==========
A direction's bytes have one owner at a time. On the *relay* that is
userspace: it reads the source and writes the target, and TCP's own windows
are the brake. On *splice* it is the kernel: the verdict program moves each
segment to the target's queue, and may at any segment *pass*, that is leave it
on the source for userspace. Order is lost only where the owner changes, so
each change has a gate:

kernel -> userspace (spill)
    The verdict passed a segment, and while passed bytes are not all forwarded
    it passes every later one: nothing more will be redirected. What it had
    redirected may still be on its way to the target's TCP, and a send() would
    overtake it. Gate: the *flush*, the target's TCP has taken all that was
    redirected. SPILLING waits for it, COPYING follows.

userspace -> kernel (return)
    Gate: all that was passed has been forwarded. The verdict sees that by
    itself (passed == forwarded), and userspace, which held the direction,
    lets go and looks once more, each side with a full barrier between its
    own word and the other's. A byte is then either seen by the one or
    announced by the other.

a new spell
    Between two reads of userspace the verdict may have returned to
    redirecting and spilled again: the bytes just read then belong behind
    others that are not flushed. The `redirected` count tells: it stands still
    during a spell. If it moved since the last flush the direction was
    OVERTAKEN and goes back to SPILLING with what it holds.

end
    FIN never travels with the bytes. It is passed on when the source has sent
    it and every byte before it was redirected or forwarded *and* taken by
    the target's TCP (ENDING). Until then a half-close would cut the backlog.
    Bytes still passed at that point (LEFTOVER) go the way of a spill first.

Direct has no state of its own: its direction is COPYING, and what the kernel
hands over past us is never both before and behind bytes that we hold. What we
read may be OVERTAKEN by what was handed over before it, as above, and the flush
is then the receiver's: it has read all of it.

A direction that never was in the map has no kernel owner: its gates are open
and it walks WAITING, COPYING, ENDING, ENDED. A faster path joins as a state
beside SPLICED, with its own gates and the same two ends.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping


class Path(enum.Enum):
    """How a direction's bytes move."""

    DIRECT = "direct"
    WIRE = "wire"
    SPLICE = "splice"
    RELAY = "relay"


class Way(enum.Enum):
    """The two directions of a session."""

    TO_BACKEND = "to_backend"
    TO_CLIENT = "to_client"

    @property
    def reverse(self) -> Way:
        """The other one: its source is this one's target."""
        return Way.TO_CLIENT if self is Way.TO_BACKEND else Way.TO_BACKEND


class End(enum.Enum):
    """How a session ended."""

    EOF = "eof"
    CLIENT_RESET = "client_reset"
    BACKEND_RESET = "backend_reset"
    IDLE_TIMEOUT = "idle_timeout"
    DRAIN_TIMEOUT = "drain_timeout"
    CLOSED = "closed"
    DIAL_FAILED = "dial_failed"
    ERROR = "error"


class State(enum.Enum):
    """Where a direction is in its life."""

    WAITING = enum.auto()
    """The backend is being dialled; the source is not read."""
    COPYING = enum.auto()
    """Userspace copies."""
    SPLICED = enum.auto()
    """The verdict redirects; userspace sleeps until a FIN or a spill."""
    SPILLING = enum.auto()
    """The verdict passes; userspace waits for the flush before it copies."""
    ENDING = enum.auto()
    """The source has sent its FIN; userspace waits for the flush."""
    ENDED = enum.auto()
    """The FIN has been passed on."""


class Event(enum.Enum):
    """What can be seen of a direction."""

    CONNECTED = enum.auto()
    """There is a target, and the session stays on the relay."""
    PAIRED = enum.auto()
    """There is a target, and both sockets are in the map."""
    SPILLED = enum.auto()
    """The verdict passed bytes."""
    OVERTAKEN = enum.auto()
    """Bytes were redirected between the last flush and those just read."""
    FLUSHED = enum.auto()
    """The target's TCP has taken all that was handed to it."""
    RETURNED = enum.auto()
    """All that was passed is forwarded, and userspace has let go."""
    FIN = enum.auto()
    """The source has sent its FIN and, if copying, nothing is left to read."""
    LEFTOVER = enum.auto()
    """The source has sent its FIN, but passed bytes are left to read."""


class Action(enum.Enum):
    """What a transition asks of the shell."""

    COPY = enum.auto()
    """Read the source and write the target until one of them would block."""
    SLEEP = enum.auto()
    """Watch for a FIN and for a spill, and for nothing else."""
    FLUSH = enum.auto()
    """Make the verdict pass from here on, and see to the flush."""
    SHUT = enum.auto()
    """Pass the FIN on."""
    NOTHING = enum.auto()
    """The event says what this state knows or will find out by itself."""


TABLE: Final[Mapping[tuple[State, Event], tuple[State, Action]]] = {
    (State.WAITING, Event.CONNECTED): (State.COPYING, Action.COPY),
    (State.WAITING, Event.PAIRED): (State.SPLICED, Action.SLEEP),
    # The copy reads until the source has no more: it will come to the FIN.
    (State.WAITING, Event.FIN): (State.WAITING, Action.NOTHING),
    (State.SPLICED, Event.SPILLED): (State.SPILLING, Action.FLUSH),
    (State.SPLICED, Event.FIN): (State.ENDING, Action.FLUSH),
    (State.SPILLING, Event.FLUSHED): (State.COPYING, Action.COPY),
    (State.SPILLING, Event.SPILLED): (State.SPILLING, Action.NOTHING),
    (State.SPILLING, Event.FIN): (State.SPILLING, Action.NOTHING),
    (State.COPYING, Event.PAIRED): (State.SPLICED, Action.SLEEP),
    (State.COPYING, Event.OVERTAKEN): (State.SPILLING, Action.FLUSH),
    (State.COPYING, Event.RETURNED): (State.SPLICED, Action.SLEEP),
    (State.COPYING, Event.SPILLED): (State.COPYING, Action.NOTHING),
    (State.COPYING, Event.FIN): (State.ENDING, Action.FLUSH),
    (State.ENDING, Event.FLUSHED): (State.ENDED, Action.SHUT),
    (State.ENDING, Event.LEFTOVER): (State.SPILLING, Action.FLUSH),
    (State.ENDING, Event.SPILLED): (State.ENDING, Action.NOTHING),
    (State.ENDING, Event.FIN): (State.ENDING, Action.NOTHING),
    (State.ENDED, Event.SPILLED): (State.ENDED, Action.NOTHING),
    (State.ENDED, Event.FIN): (State.ENDED, Action.NOTHING),
}
"""State and event to the next state and its action; a missing pair is a bug."""
