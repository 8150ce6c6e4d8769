# SPDX-License-Identifier: Apache-2.0
"""The workers of one process: started, counted, drained and closed together.

A gateway of one process has them in that process; with `--processes` each
worker process has its own, and the supervisor asks those.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sockgw.metrics import Tally
from sockgw.session import End
from sockgw.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sockgw.backend import Backends
    from sockgw.config import Config
    from sockgw.datapath import Datapath
    from sockgw.direct import Direct
    from sockgw.listener import Listener
    from sockgw.wire import Wire

_log = logging.getLogger("sockgw")


@dataclass(frozen=True, slots=True)
class Count:
    """What workers have counted since their start, and what is open now."""

    tally: Tally = field(default_factory=Tally)
    sessions_active: Counter[str] = field(default_factory=Counter)
    """Open sessions by the path that they are on."""
    active_pairs: int = 0
    kernel_held_bytes: int = 0

    @property
    def sessions_open(self) -> int:
        """Open sessions, on any path."""
        return sum(self.sessions_active.values())

    @classmethod
    def sum(cls, counts: Iterable[Count]) -> Count:
        """Return the sum of `counts`."""
        counts = list(counts)
        return cls(
            tally=Tally.merge(count.tally for count in counts),
            sessions_active=sum((count.sessions_active for count in counts), Counter()),
            active_pairs=sum(count.active_pairs for count in counts),
            kernel_held_bytes=sum(count.kernel_held_bytes for count in counts),
        )


class Workers:
    """The worker threads of this process, on one listener."""

    def __init__(
        self,
        config: Config,
        *,
        listener: Listener,
        backends: Backends,
        datapath: Datapath | None,
        wire: Wire | None = None,
        direct: Direct | None = None,
        first: int = 0,
    ) -> None:
        """Prepare `config.threads` workers, numbered from `first`; `start` runs them."""
        self._listener = listener
        self._datapath = datapath
        self._direct = direct
        self._drain_timeout_s = config.drain_timeout_s
        self._deadline: threading.Timer | None = None
        self._crash: BaseException | None = None
        self._lock = threading.Lock()  # guards the workers against orders after their end
        self._is_draining = False
        self._is_released = False
        warned_reasons: set[str] = set()
        self._workers = [
            Worker(
                index,
                listener=listener,
                backends=backends,
                datapath=datapath,
                wire=wire,
                direct=direct,
                connect_timeout_s=config.connect_timeout_s,
                idle_timeout_s=config.idle_timeout_s,
                warned_reasons=warned_reasons,
                on_crash=self._crashed,
            )
            for index in range(first, first + config.threads)
        ]

    def __iter__(self) -> Iterator[Worker]:
        """Return each worker in turn."""
        return iter(self._workers)

    def start(self) -> None:
        """Start to accept."""
        for worker in self._workers:
            worker.start()

    def drain(self) -> None:
        """Stop accepting, and end when the sessions have, or at the deadline."""
        with self._lock:
            if self._is_draining:
                return
            self._is_draining = True
            self._listener.close()
            if self._is_released:
                return
            for worker in self._workers:
                worker.drain()
            self._deadline = threading.Timer(
                self._drain_timeout_s, self._reset_all, [End.DRAIN_TIMEOUT]
            )
            self._deadline.name = "sockgw-drain"
            self._deadline.daemon = True
            self._deadline.start()

    def close(self) -> None:
        """Reset every session, now."""
        self.drain()
        self._reset_all(End.CLOSED)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until every session has ended after `drain` or `close`.

        Returns False when `timeout_s` has passed before. Raises what stopped a
        worker, if one did not end by itself.
        """
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        for worker in self._workers:
            worker.thread.join(None if until_s is None else max(0.0, until_s - time.monotonic()))
            if worker.thread.is_alive():
                return False
        self.release()
        if self._crash is not None:
            raise self._crash
        return True

    def release(self) -> None:
        """Free what the workers held, who have ended or were never started."""
        with self._lock:
            is_first, self._is_released = not self._is_released, True
            if self._deadline is not None:
                self._deadline.cancel()
        if is_first:
            for worker in self._workers:
                worker.release()

    def count(self) -> Count:
        """Read every count, without stopping anybody."""
        active: Counter[str] = Counter()
        for worker in self._workers:
            active.update(worker.active)
        pairs = self._datapath.active_pairs if self._datapath is not None else 0
        watched = self._direct.active if self._direct is not None else 0
        return Count(
            tally=Tally.merge(worker.tally for worker in self._workers),
            sessions_active=active,
            active_pairs=pairs + watched,
            kernel_held_bytes=sum(worker.held_by_kernel() for worker in self._workers),
        )

    def _reset_all(self, end: End) -> None:
        with self._lock:
            if not self._is_released:
                for worker in self._workers:
                    worker.close_sessions(end)

    def _crashed(self, error: BaseException) -> None:
        """End everything: a process without one of its workers strands sessions."""
        self._crash = error
        _log.critical("worker died: %s: %s", type(error).__name__, error)
        self.close()
