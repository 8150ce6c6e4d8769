# SPDX-License-Identifier: Apache-2.0
"""A call that is stopped right before one of its system calls.

So C code that is loaded as it is can be held between two of its lines: after
it has received, say, and before it sends. A seccomp filter of the thread that
makes the call asks this process, and does not get its answer before the test
has done what it wants to do at that step.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import select
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from .leftovers import SYSTEM_CALLS
from .pairing import DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_LIBC = ctypes.CDLL(None, use_errno=True)

# <linux/seccomp.h>, <linux/bpf_common.h>
_SET_MODE_FILTER = 1
_FLAG_NEW_LISTENER = 8
_ASK = 0x7FC00000
_ALLOW = 0x7FFF0000
_LOAD_WORD = 0x20
_JUMP_IF_EQUAL = 0x15
_RETURN = 0x06
_RECEIVE = 0xC0502100
_ANSWER = 0xC0182101
_CONTINUE = 1
_QUESTION = struct.Struct("=Q I I i I Q 6Q")
_REPLY = struct.Struct("=Q q i I")


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


class _Call(threading.Thread):
    """Makes the call, in a thread whose system call `name` is asked about."""

    def __init__(self, name: str, call: Callable[[], Any]) -> None:
        """Start the thread, and wait until it has its filter."""
        super().__init__(name=f"until {name}")
        self._numbers = SYSTEM_CALLS[platform.machine()]
        self._number = self._numbers[name]
        self._call = call
        self._is_ready = threading.Event()
        self.listener = -1
        self.error: BaseException | None = None
        self.start()
        assert self._is_ready.wait(DEADLINE_S)

    def run(self) -> None:
        """Filter, then call."""
        try:
            self._install()
            self._is_ready.set()
            self._call()
        except BaseException as error:  # noqa: BLE001 - the test raises it
            self.error = error
        finally:
            self._is_ready.set()

    def _install(self) -> None:
        code = ctypes.create_string_buffer(
            b"".join(
                struct.pack("=HBBI", *line)
                for line in (
                    (_LOAD_WORD, 0, 0, 0),  # seccomp_data.nr
                    (_JUMP_IF_EQUAL, 0, 1, self._number),
                    (_RETURN, 0, 0, _ASK),
                    (_RETURN, 0, 0, _ALLOW),
                )
            )
        )
        program = _Program(4, ctypes.addressof(code))
        fd = _LIBC.syscall(
            self._numbers["seccomp"], _SET_MODE_FILTER, _FLAG_NEW_LISTENER, ctypes.byref(program)
        )
        if fd < 0:
            raise OSError(ctypes.get_errno(), "seccomp")
        self.listener = fd

    def question(self) -> tuple[int, tuple[int, ...]] | None:
        """Return the id and the arguments of the next such system call; None: there is none."""
        poller = select.poll()
        poller.register(self.listener, select.POLLIN)
        deadline_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline_s:
            mask = sum(mask for _, mask in poller.poll(1))
            if mask & select.POLLIN:
                raw = bytearray(_QUESTION.size)
                fcntl.ioctl(self.listener, _RECEIVE, raw)
                number, _, _, _, _, _, *args = _QUESTION.unpack(raw)
                return number, tuple(args)
            if mask or not self.is_alive():
                return None
        raise AssertionError(f"{self.name}: neither there nor at the end")

    def answer(self, number: int) -> None:
        """Let the system call be made."""
        fcntl.ioctl(self.listener, _ANSWER, _REPLY.pack(number, 0, 0, _CONTINUE))

    def finish(self) -> None:
        """Let the call come to its end."""
        while (question := self.question()) is not None:
            self.answer(question[0])
        self.join(DEADLINE_S)
        assert not self.is_alive()
        os.close(self.listener)


@contextlib.contextmanager
def stopped_before(
    name: str, call: Callable[[], Any], is_it: Callable[..., bool] = lambda *_: True
) -> Iterator[tuple[int, ...]]:
    """Make `call` in a thread, and hold it before the system call `name`.

    Yields the arguments of the first one for which `is_it(*arguments)` is true;
    fails if there is none. The call goes on, to its end, when the body is done.
    """
    thread = _Call(name, call)
    if thread.listener < 0:
        assert thread.error is not None
        raise thread.error
    try:
        while True:
            question = thread.question()
            if question is None:
                if thread.error is not None:
                    raise thread.error
                raise AssertionError(f"the call came to its end without {name}")
            number, arguments = question
            if is_it(*arguments):
                break
            thread.answer(number)
        try:
            yield arguments
        finally:
            thread.answer(number)
    finally:
        thread.finish()
    if thread.error is not None:
        raise thread.error
