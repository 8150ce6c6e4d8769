# SPDX-License-Identifier: Apache-2.0
"""Open sessions and hold them: `python idle.py HOST PORT COUNT`, a program of its own.

It is no load. Each session asks once, as a keep-alive client has before it
falls silent, so that all of it is set up as far as the backend; then this
program sleeps until it is ended, or complains if somebody ends a session.
"""

from __future__ import annotations

import select
import sys
from http.client import HTTPConnection
from typing import Final

_AT_ONCE: Final = 64  # few enough for everybody's accept queue: nobody's SYN is dropped
_ANSWER_S: Final = 20.0


def main() -> str:
    """Hold the sessions for ever; return why that is over."""
    host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    held: list[HTTPConnection] = []
    poller = select.poll()
    while len(held) < count:
        batch = [
            HTTPConnection(host, port, timeout=_ANSWER_S)
            for _ in range(min(_AT_ONCE, count - len(held)))
        ]
        for connection in batch:
            connection.request("GET", "/")
        for connection in batch:
            with connection.getresponse() as answer:
                answer.read()
            poller.register(connection.sock, select.POLLIN)
        held += batch
    return f"{len(poller.poll())} of {count} idle sessions were closed"


if __name__ == "__main__":
    sys.exit(main())
