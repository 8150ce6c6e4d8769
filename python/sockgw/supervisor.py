# SPDX-License-Identifier: Apache-2.0
"""Worker processes: forked, asked, told, and replaced when one dies.

The parent has loaded the datapath, bound the listener and the metrics page
before the fork; a worker process inherits all of it, keeps its share, and runs
`Workers` on the one listening socket. The two speak over a socket pair, one
message at a time: the parent sends ``drain``, ``close`` or ``count N``, and
hears ``(N, Count)``, which a process also sends, with N = -1, as its last word.

The parent forks, and forks again, while threads of its own may run (a scrape,
the signals'). A child therefore touches nothing that these could hold: it uses
neither the supervisor's lock nor the metrics page, it resolves no name, the
handlers of the log are held by the forking thread and made anew by `logging`
in the child, and malloc and the import system look after themselves.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pickle
import select
import signal
import socket
import threading
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from sockgw.metrics import Tally
from sockgw.workers import Count, Workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sockgw.backend import Backends
    from sockgw.config import Config
    from sockgw.datapath import Datapath
    from sockgw.direct import Direct
    from sockgw.listener import Listener
    from sockgw.wire import Wire

_log = logging.getLogger("sockgw")

_ANSWER_S: Final = 1.0
"""How long a scrape waits for the processes; who is later is left out of the gauges."""
_SHORT_LIFE_S: Final = 1.0
"""A process that died younger than this is replaced this much later."""
_LATE_S: Final = 10.0
"""What a process may take, beyond the drain's time or after a close, before it is killed."""
_LAST_WORD: Final = -1
_MESSAGE_BYTES: Final = 1 << 17
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True)
class Share:
    """What one process has of the gateway; who takes its place has the same."""

    index: int
    sessions: range
    workers: range


def shares(sessions: int, processes: int, threads: int) -> list[Share]:
    """Divide `sessions` evenly among `processes` of `threads` workers each."""
    firsts = [sessions * index // processes for index in range(processes + 1)]
    return [
        Share(
            index,
            range(firsts[index], firsts[index + 1]),
            range(index * threads, (index + 1) * threads),
        )
        for index in range(processes)
    ]


class _Process:
    """A worker process, as its parent knows it."""

    def __init__(self, share: Share, pid: int, control: socket.socket) -> None:
        """Take the parent's end of `control`; `pid` has not been waited for."""
        self.share = share
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.control = control
        self.last = Count()
        self.started_s = time.monotonic()

    def tell(self, order: str) -> bool:
        """Send `order`; False when nobody will read it."""
        try:
            self.control.send(order.encode(), socket.MSG_DONTWAIT)
        except OSError:  # EPIPE: it has ended; EAGAIN: it has not read for long
            return False
        return True

    def hear(self) -> int | None:
        """Take its next message into `last`; return the number, None when there is none."""
        while True:
            try:
                message = self.control.recv(_MESSAGE_BYTES, socket.MSG_DONTWAIT)
            except ConnectionResetError:  # told once, of orders unread; its messages are here yet
                continue
            except BlockingIOError:
                return None
            if not message:
                return None
            number, self.last = pickle.loads(message)  # noqa: S301 - our own fork wrote it
            return int(number)

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Close what this process has open for it."""
        self.control.close()
        os.close(self.pidfd)


class Supervisor:
    """Worker processes that share a listener and a datapath."""

    def __init__(
        self,
        config: Config,
        *,
        listener: Listener,
        backends: Backends,
        datapath: Datapath | None,
        wire: Wire | None = None,
        direct: Direct | None = None,
        shares: Iterable[Share],
        forget: Iterable[Callable[[], None]],
    ) -> None:
        """Keep what the processes will inherit; `start` forks them.

        Each calls `forget`, which closes its copies of what is the parent's
        alone.
        """
        self._config = config
        self._listener = listener
        self._backends = backends
        self._datapath = datapath
        self._wire = wire
        self._direct = direct
        self._shares = list(shares)
        self._forget = list(forget)
        self._prctl = _prctl()
        # Guards all below, and the processes' sockets: taken by scrapes, by
        # drain() and close(), and by the loop to bury and to fork.
        self._lock = threading.Lock()
        self._running: dict[int, _Process] = {}
        self._due_s: dict[int, float] = {}
        self._ended = Tally()
        self._question = 0
        self._is_draining = False
        self._kill_at_s = float("inf")
        self._is_released = False
        self._bell = _eventfd()
        # One for each process, that all of them may ring: look at the listener.
        self._bells = [_eventfd() for _ in self._shares]

    # Called by the main thread, which must be the one that forks: when it
    # ends, so do its children (PR_SET_PDEATHSIG).

    def start(self) -> None:
        """Fork the processes; they begin to accept.

        Raises OSError when one cannot be forked; `release` ends the others.
        """
        # What is here now is shared for good: a collection in one process
        # would write to every object, and copy the pages.
        gc.collect()
        gc.freeze()
        for share in self._shares:
            try:
                with self._lock:
                    self._fork(share)
            except OSError as error:
                problem = f"start worker process {share.index}: {error.strerror}"
                way_out = "use fewer --processes, or 1, which forks none"
                raise OSError(error.errno, f"{problem}; {way_out}") from error

    def wait(self, timeout_s: float | None = None) -> bool:
        """Look after the processes until they have ended after `drain` or `close`.

        Returns False when `timeout_s` has passed before.
        """
        until_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while True:
            with self._lock:
                if self._is_released or (self._is_draining and not self._running):
                    break
                running = {process.pidfd: process for process in self._running.values()}
                wake_s = min([until_s, self._kill_at_s, *self._due_s.values()])
            poller = select.poll()
            for fd in (self._bell, *running):
                poller.register(fd, select.POLLIN)
            left_s = max(0.0, wake_s - time.monotonic())
            for fd, _ in poller.poll(None if wake_s == float("inf") else left_s * 1000):
                if fd == self._bell:
                    os.eventfd_read(self._bell)
                else:
                    self._bury(running[fd])
            self._replace()
            self._kill_the_late()
            if time.monotonic() >= until_s:
                return False
        self.release()
        return True

    def release(self) -> None:
        """End what still runs, without a word, and close what was opened."""
        with self._lock:
            if self._is_released:
                return
            self._is_released = True
            for process in self._running.values():
                process.kill()
                os.waitpid(process.pid, 0)
                process.close()
            self._running.clear()
            for bell in (self._bell, *self._bells):
                os.close(bell)
        gc.unfreeze()

    # Called by any thread.

    def drain(self) -> None:
        """Have all processes stop accepting, and end when their sessions have."""
        with self._lock:
            if self._is_draining:
                return
            self._is_draining = True
            self._due_s.clear()
            # All copies of the socket stop to listen, whoever has yet to close
            # one (inet_shutdown): the port is free, and the backlog reset.
            with contextlib.suppress(OSError):
                self._listener.socket.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._tell_all("drain", self._config.drain_timeout_s + _LATE_S)

    def close(self) -> None:
        """Have all processes reset every session, now."""
        self.drain()
        with self._lock:
            self._tell_all("close", _LATE_S)

    def count(self) -> Count:
        """Ask every process for its counts.

        What is open now is the sum of the answers that came in time. What was
        counted since the start includes what each process, dead or alive, was
        last heard to have counted: it never goes back.
        """
        with self._lock:
            answers = self._ask()
            tallies = [process.last.tally for process in self._running.values()]
            return replace(Count.sum(answers), tally=Tally.merge([self._ended, *tallies]))

    def pids(self) -> list[int]:
        """Return the processes' ids."""
        # list() copies in one step, while the loop goes on.
        return [process.pid for process in list(self._running.values())]

    # All that follows is called with the lock, or takes it.

    def _tell_all(self, order: str, within_s: float) -> None:
        for process in self._running.values():
            process.tell(order)
        self._kill_at_s = min(self._kill_at_s, time.monotonic() + within_s)
        if not self._is_released:
            os.eventfd_write(self._bell, 1)

    def _ask(self) -> list[Count]:
        self._question += 1
        asked = {
            process.control.fileno(): process
            for process in self._running.values()
            if process.tell(f"count {self._question}")
        }
        poller = select.poll()
        for fd in asked:
            poller.register(fd, select.POLLIN)
        answers: list[Count] = []
        until_s = time.monotonic() + _ANSWER_S
        while asked and (left_s := until_s - time.monotonic()) > 0:
            for fd, _ in poller.poll(left_s * 1000):
                number = asked[fd].hear()
                if number == self._question:
                    answers.append(asked[fd].last)
                if number in {self._question, None}:
                    del asked[fd]
                    poller.unregister(fd)
        return answers

    def _bury(self, process: _Process) -> None:
        """Take leave of a process that has ended: by order, or by itself."""
        share = process.share
        with self._lock:
            while process.hear() is not None:
                pass
            # Read before it is waited for: a sum of the processes' CPU time
            # then has it among the running, or among the children that ended.
            _, status = os.waitpid(process.pid, 0)
            del self._running[share.index]
            process.close()
            self._ended = Tally.merge([self._ended, process.last.tally])
            code = os.waitstatus_to_exitcode(status)
            if code == 0 and self._is_draining:
                return
            how = f"exited with {code}"
            if code < 0:
                how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
            delay_s = 0.0
            if time.monotonic() - process.started_s < _SHORT_LIFE_S:
                delay_s = _SHORT_LIFE_S
            what_next = "starting another" + (f" in {delay_s:g} s" if delay_s else "")
            if self._is_draining:
                what_next = "the gateway is draining: none takes its place"
            else:
                self._due_s[share.index] = time.monotonic() + delay_s
            # It may have been the only one that was told of a connection.
            _ring(self._bells)
        _log.error(
            "worker process %d (pid %d) %s: its sessions have ended; %s",
            *(share.index, process.pid, how, what_next),
        )
        # The kernel has closed its sockets before it said that it is dead.
        if self._datapath is not None:
            self._datapath.reclaim(share.workers)
        if self._wire is not None:
            self._wire.reclaim(share.index, share.sessions)
        if self._direct is not None:
            self._direct.reclaim(share.sessions, share.workers)

    def _replace(self) -> None:
        with self._lock:
            now_s = time.monotonic()
            for index in [index for index, due_s in self._due_s.items() if due_s <= now_s]:
                try:
                    self._fork(self._shares[index])
                except OSError as error:  # no memory, or too many processes: now
                    self._due_s[index] = now_s + _SHORT_LIFE_S
                    _log.error("fork worker process %d: %s; trying again", index, error.strerror)
                else:
                    del self._due_s[index]

    def _kill_the_late(self) -> None:
        with self._lock:
            if time.monotonic() >= self._kill_at_s:
                self._kill_at_s = float("inf")
                for process in self._running.values():
                    process.kill()

    def _fork(self, share: Share) -> None:
        control, childs_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        handlers = list(_log.handlers)
        for handler in handlers:
            handler.acquire()
        try:
            with warnings.catch_warnings():
                # Python 3.12 warns of the threads; see above why it may.
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                control.close()
                self._be_worker_process(share, childs_control, parent)
        finally:
            for handler in handlers:
                handler.release()
        childs_control.close()
        try:
            self._running[share.index] = _Process(share, pid, control)
        except OSError:  # of pidfd_open
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            control.close()
            raise

    # The child.

    def _be_worker_process(self, share: Share, control: socket.socket, parent: int) -> None:
        """Serve as `share`'s process; never returns."""
        code = 1
        try:
            code = self._work(share, control, parent)
        except BaseException as error:  # noqa: BLE001 - nobody else is left to tell
            _log.critical("worker process %d: %s: %s", share.index, type(error).__name__, error)
        finally:
            os._exit(code)

    def _work(self, share: Share, control: socket.socket, parent: int) -> int:
        # A terminal's Ctrl-C and a service manager's SIGTERM reach every
        # process of the group; they are the parent's to count.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        self._prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            return 1
        for process in self._running.values():
            process.close()
        for forget in self._forget:
            forget()
        os.close(self._bell)
        if self._datapath is not None:
            self._datapath.narrow(share.sessions, share.workers)
        if self._wire is not None:
            self._wire.narrow(share.index, share.sessions, share.workers)
        if self._direct is not None:
            self._direct.narrow(share.sessions, share.workers)
        others = [bell for index, bell in enumerate(self._bells) if index != share.index]
        self._listener.share(len(share.sessions), partial(_ring, others))
        workers = Workers(
            self._config,
            listener=self._listener,
            backends=self._backends,
            datapath=self._datapath,
            wire=self._wire,
            direct=self._direct,
            first=share.workers.start,
        )
        workers.start()
        threading.Thread(
            target=self._obey,
            args=(control, self._bells[share.index], workers),
            name="sockgw-control",
            daemon=True,
        ).start()
        code = 0
        try:
            workers.wait()
        except BaseException:  # noqa: BLE001 - logged by the worker that it stopped
            code = 1
        _answer(control, _LAST_WORD, workers)
        return code

    def _obey(self, control: socket.socket, bell: int, workers: Workers) -> None:
        """Do what the parent says, and sleep meanwhile."""
        poller = select.poll()
        for fd in (control.fileno(), bell):
            poller.register(fd, select.POLLIN)
        try:
            while True:
                for fd, _ in poller.poll():
                    if fd == bell:
                        os.eventfd_read(bell)
                        self._listener.look_again()
                        continue
                    order, _, number = control.recv(_MESSAGE_BYTES).decode().partition(" ")
                    if order == "drain":
                        workers.drain()
                    elif order == "close":
                        workers.close()
                    elif order == "count":
                        _answer(control, int(number), workers)
                    else:  # the parent is gone
                        os._exit(1)
        except BaseException as error:  # noqa: BLE001 - a process that hears no order is none
            _log.critical("control: %s: %s", type(error).__name__, error)
            os._exit(1)


def _answer(control: socket.socket, number: int, workers: Workers) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent is gone, and so are we
        control.send(pickle.dumps((number, workers.count())))


def _eventfd() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def _ring(bells: list[int]) -> None:
    for bell in bells:
        os.eventfd_write(bell, 1)


def _prctl() -> Callable[[int, int], Any]:
    """Return prctl(2), looked up before the fork."""
    import ctypes  # noqa: PLC0415 - 2 MB that a single process does without

    return ctypes.CDLL(None).prctl
