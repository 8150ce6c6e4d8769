# SPDX-License-Identifier: Apache-2.0
"""One direction of a session: `sockgw.session`'s machine on real sockets.

Owns the order in which the relay and splice act on a source and a target;
decides nothing that is not in the table. The session around it owns the
sockets, the worker the clock and epoll.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final, Protocol

from sockgw.session import TABLE, Action, Event, Path, State
from sockgw.splice import LINGER_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from sockgw.direct import DirectSlot
    from sockgw.metrics import Tally
    from sockgw.relay import Relay
    from sockgw.session import Way
    from sockgw.splice import Splice

_STEPS: Final = 8
"""Buffers copied before the other sessions of the worker have their turn."""
_SPINS: Final = 4
"""Looks at a flush without a pause: a kworker needs some 20 us for a segment."""
_RETRY_S: Final = 0.001
"""The pause after those; each further one is as much longer, up to the limit."""
_RETRY_MAX_S: Final = 0.05
_KICK_AFTER: Final = 20
"""Looks after which the verdict is run again on what the source has queued."""
_WIDEN_S: Final = 1.0
"""How often the source of a full target is looked at: what it holds can still grow."""


class Host(Protocol):
    """What a direction asks of its session."""

    tally: Tally

    def later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call back in `delay_s`, unless the session has ended."""

    def lost(self, way: Way, error: OSError) -> None:
        """Take note that a socket failed; `way` is the direction it sources."""

    def damaged(self, way: Way) -> None:
        """Take note that `way` cannot go on: bytes are missing or doubled."""

    def shut(self, way: Way) -> None:
        """Pass the FIN on: `way` has ended."""


class Direction:
    """A direction from accept to its end."""

    __slots__ = (
        "_copied_at_s",
        "_flush_began_s",
        "_host",
        "_is_looking",
        "_is_looking_back",
        "_is_widening",
        "_looks",
        "direct",
        "has_seen_fin",
        "relay",
        "spills",
        "splice",
        "state",
        "way",
    )

    def __init__(self, way: Way, relay: Relay, host: Host, *, is_ended: bool = False) -> None:
        """Wait for the backend, unless the FIN is passed on already; `relay` has the sockets."""
        self.way = way
        self.relay = relay
        self.splice: Splice | None = None
        self.direct: DirectSlot | None = None
        """What is handed over past this; set by the session."""
        self.state = State.ENDED if is_ended else State.WAITING
        self.spills = 0
        self._host = host
        self.has_seen_fin = is_ended
        self._is_looking = False
        self._is_looking_back = False
        self._is_widening = False
        self._looks = 0
        self._flush_began_s = 0.0
        self._copied_at_s = 0.0

    @property
    def is_ended(self) -> bool:
        """Whether the FIN has been passed on."""
        return self.state is State.ENDED

    @property
    def is_copying(self) -> bool:
        """Whether userspace copies, and holds nothing."""
        return self.state is State.COPYING and not self.relay.is_holding

    @property
    def wants_read(self) -> bool:
        """Whether to watch the source for bytes."""
        return self.is_copying

    @property
    def wants_write(self) -> bool:
        """Whether to watch the target for room."""
        return self.state is State.COPYING and self.relay.is_holding

    @property
    def moved(self) -> int:
        """A number that grows with every byte that moves, on any path."""
        moved = self.relay.taken + self.relay.written
        if self.splice is not None:
            moved += self.splice.slot.redirected + self.splice.slot.passed
        if self.direct is not None:
            moved += self.direct.bytes
        return moved

    def bytes_by_path(self) -> dict[Path, int]:
        """Return the bytes that have left our sockets for the target, by the way they went."""
        spliced = self.splice.slot.redirected if self.splice is not None else 0
        return {Path.SPLICE: spliced, Path.RELAY: self.relay.written}

    def connected(self, splice: Splice | None) -> None:
        """Begin: there is a target, and `splice` if the source is in the map."""
        self.splice = splice
        if self.is_ended:
            return
        if splice is not None and splice.can_return:
            self._feed(Event.PAIRED)
            if self.has_seen_fin:
                self._feed(Event.FIN)
        elif self.relay.is_holding and self.direct is not None and self.direct.is_overtaken:
            # The loop has received it, and found that it does not come next.
            self.state, _ = TABLE[self.state, Event.CONNECTED]
            self._may_send()
        else:
            self._feed(Event.CONNECTED)

    def paired(self, splice: Splice | None) -> None:
        """Go over to the kernel, if it has taken the source; `is_copying` was true just now."""
        self.splice = splice
        if splice is not None and splice.can_return:
            self._feed(Event.PAIRED)

    def saw_fin(self) -> None:
        """Take note that the source's peer has sent its FIN."""
        if not self.has_seen_fin:
            self.has_seen_fin = True
            if self.state is not State.COPYING:  # the copy comes to it by itself
                self._feed(Event.FIN)

    def saw_spill(self) -> None:
        """Take note of an announced spill, which may be long over."""
        if self.splice is not None and self.splice.slot.is_passing:
            self._feed(Event.SPILLED)

    def saw_room(self) -> None:
        """Go on copying: the source has bytes, or the target has room."""
        if self.state is State.COPYING:
            self._copy()

    @property
    def is_flushing(self) -> bool:
        """Whether bytes or a FIN wait for what went before them another way."""
        return self.state in {State.SPILLING, State.ENDING}

    def look(self) -> None:
        """Go on with whatever this direction is waiting for."""
        if self.state in (State.SPILLING, State.ENDING):
            self._check_flush()
        elif self.state is State.COPYING:
            self._copy()

    def is_delivered(self) -> bool:
        """Tell whether the target's TCP has all that the source gave us."""
        if self.relay.is_holding:
            return False
        if self.splice is None or self.is_ended:
            return True
        return self.splice.unread <= 0 and self.splice.is_flushed()

    def _feed(self, event: Event) -> None:
        self.state, action = TABLE[self.state, event]
        if action is Action.COPY:
            self._copied_at_s = time.monotonic()
            self._copy()
        elif action is Action.FLUSH:
            self._begin_flush(event)
        elif action is Action.SHUT:
            self._host.shut(self.way)

    def _begin_flush(self, event: Event) -> None:
        now_s = time.monotonic()
        self._looks = 0
        self._flush_began_s = now_s
        if self.state is State.SPILLING and self.splice is not None:
            self.splice.spilled(now_s)
            if event is Event.SPILLED:
                self.spills += 1
                self._host.tally.spills[self.way.value] += 1
        self._check_flush()

    def _check_flush(self) -> None:
        """Feed what the gate of SPILLING or ENDING says, or look again later."""
        splice = self.splice
        if self.direct is not None:
            self._looks += 1
            if not self.direct.is_flushed():
                self._look_again()
                return
            if splice is None:
                self._host.tally.flushed(time.monotonic() - self._flush_began_s)
        if splice is not None:
            self._looks += 1
            if self.state is State.ENDING:
                if not splice.has_seen_all():
                    if self._looks > _KICK_AFTER:
                        splice.slot.kick()
                    self._look_again()
                    return
                if splice.unread > 0:
                    self._feed(Event.LEFTOVER)
                    return
            if not splice.is_flushed():
                self._look_again()
                return
            self._host.tally.flushed(time.monotonic() - self._flush_began_s)
        self._feed(Event.FLUSHED)

    def _look_again(self) -> None:
        if not self._is_looking:
            self._is_looking = True
            pauses = max(0, self._looks - _SPINS)
            self._host.later(min(pauses * _RETRY_S, _RETRY_MAX_S), self._looked)

    def _looked(self) -> None:
        self._is_looking = False
        self.look()

    def _look_back(self) -> None:
        if not self._is_looking_back:
            self._is_looking_back = True
            self._host.later(LINGER_S, self._looked_back)

    def _looked_back(self) -> None:
        self._is_looking_back = False
        if self.wants_read:
            self._copy()

    def _copy(self) -> None:
        """Read and write until one would block, the stream ends, or enough."""
        relay = self.relay
        for _ in range(_STEPS):
            if relay.is_holding and not self._send():
                self._widen()
                return
            if not self._run():
                return
            if relay.is_holding:  # the run's last chunk
                continue
            try:
                count = relay.receive()
            except OSError as error:
                self._host.lost(self.way, error)
                return
            if count is None:
                self._found_nothing()
                return
            if count == 0:
                self._found_end()
                return
            if not self._may_send():
                return
        self._looks = 0
        self._look_again()

    def _run(self) -> bool:
        """Copy as far as that needs no decision; False when it came to one."""
        splice = self.splice
        if not self.relay.can_run:
            return True
        written, error = self.relay.run(
            splice.guard if splice is not None else None,
            self.direct.guard if self.direct is not None else None,
        )
        if written:
            self._host.tally.bytes[self.way.value, "relay"] += written
            self._copied_at_s = time.monotonic()
        if error:
            self._host.lost(self.way, OSError(error, os.strerror(error)))
            return False
        return not self.relay.is_holding or self._may_send()

    def _may_send(self) -> bool:
        """Look whether what was just received comes next; else see to it."""
        if self.direct is not None and self.direct.is_overtaken:
            self._copied_at_s = time.monotonic()
            self.spills += 1
            self._host.tally.spills[self.way.value] += 1
            self._feed(Event.OVERTAKEN)
            return False
        splice = self.splice
        if splice is None:
            return True
        self._copied_at_s = time.monotonic()
        if splice.slot.is_damaged:
            self._host.damaged(self.way)
            return False
        # The verdict redirected between release() and this: what is held now
        # comes behind it.
        if splice.is_overtaken:
            self._feed(Event.OVERTAKEN)
            return False
        return True

    def _send(self) -> bool:
        """Send what is held; False when some is left, or the target failed."""
        try:
            count = self.relay.send()
        except OSError as error:
            self._host.lost(self.way.reverse, error)
            return False
        if count:
            self._host.tally.bytes[self.way.value, "relay"] += count
            if self.splice is not None:
                self.splice.slot.forward(count)
        return not self.relay.is_holding

    def _widen(self) -> None:
        """Keep the source in order while the target is full, or has failed."""
        if self.relay.is_holding and not self._is_widening:
            self.relay.widen()
            self._is_widening = True
            self._host.later(_WIDEN_S, self._widened)

    def _widened(self) -> None:
        self._is_widening = False
        self._widen()

    def _found_nothing(self) -> None:
        """Consider the way back: all that could be read is forwarded."""
        self.relay.narrow()
        splice = self.splice
        if splice is None or not splice.can_return:
            return
        now_s = time.monotonic()
        if splice.wants_return(now_s - self._copied_at_s) and splice.returned(now_s):
            self._feed(Event.RETURNED)
            if self.has_seen_fin:
                self._feed(Event.FIN)
        else:
            self._look_back()

    def _found_end(self) -> None:
        """Believe recv()'s 0 only if it agrees with what TCP has received."""
        splice = self.splice
        if splice is not None and (splice.unread > 0 or not splice.has_seen_all()):
            self._looks += 1
            self._look_again()
            return
        self._feed(Event.FIN)
