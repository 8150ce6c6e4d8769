# SPDX-License-Identifier: Apache-2.0
"""Splice, seen from userspace: the gates at which a direction changes owner.

Owns the comparison of the verdict's words with what TCP says of both
sockets; moves no byte and waits for nothing. The theory is in
`sockgw.session`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sockgw.datapath import Slot
    from sockgw.relay import Relay

KEEPS_SPILLING_S: Final = 1.0
"""A spill this soon after a return makes the direction linger on the relay."""
_NEVER_S: Final = float("-inf")
LINGER_S: Final = 0.05
"""How long a lingering direction must be idle before it returns."""


class Splice:
    """The kernel's side of one direction: its slot, and the gates.

    Made right after pairing; `relay` is the same direction's copy, whose
    counts until then are the base of what the slot counts.
    """

    __slots__ = (
        "_flushed_at",
        "_is_lingering",
        "_relay",
        "_returned_at_s",
        "_taken_before",
        "can_return",
        "slot",
    )

    def __init__(self, slot: Slot, relay: Relay, *, can_return: bool) -> None:
        """Take over from `relay`, which holds nothing."""
        self.slot = slot
        self.can_return = can_return
        self._relay = relay
        self._taken_before = relay.taken
        self._flushed_at = 0
        self._returned_at_s = _NEVER_S
        self._is_lingering = False

    @property
    def unread(self) -> int:
        """Passed bytes that userspace has not yet received.

        They may not be readable yet: behind a backlog of the reverse
        direction they wait in the socket's psock, where recv() does not see
        them, and answers 0 if the FIN has come (6.18, tcp_bpf_recvmsg_parser).
        """
        return self.slot.passed - (self._relay.taken - self._taken_before)

    @property
    def is_overtaken(self) -> bool:
        """Whether bytes were redirected since the last flush."""
        return self.slot.redirected != self._flushed_at

    @property
    def guard(self) -> tuple[Any, int]:
        """The words by which `Relay.run` sees that it still copies in order."""
        return self.slot.guard(self._flushed_at)

    def outstanding(self) -> int:
        """Return the bytes redirected that the target's TCP has not yet taken."""
        return max(0, self._relay.written + self.slot.redirected - self.slot.taken())

    def is_flushed(self) -> bool:
        """Look whether the target's TCP has taken all that was redirected.

        To be asked only while the verdict passes, or after the source's end:
        `redirected` must stand still.
        """
        redirected = self.slot.redirected
        if self.slot.taken() != self._relay.written + redirected:
            return False
        self._flushed_at = redirected
        return True

    def has_seen_all(self) -> bool:
        """Look whether every byte before the source's FIN met the verdict."""
        seen = self._taken_before + self.slot.redirected + self.slot.passed
        return self.slot.received() - 1 == seen  # the FIN counts as one

    def spilled(self, now_s: float) -> None:
        """Hold the direction, and note whether it keeps spilling."""
        self.slot.hold()
        self._is_lingering = now_s - self._returned_at_s < KEEPS_SPILLING_S

    def wants_return(self, idle_s: float) -> bool:
        """Tell whether a copy that found nothing more should let go now."""
        return self.can_return and (not self._is_lingering or idle_s >= LINGER_S)

    def returned(self, now_s: float) -> bool:
        """Let go; False when bytes came meanwhile, and the copy goes on."""
        if not self.slot.release():
            self.slot.hold()
            return False
        self._returned_at_s = now_s
        return True
