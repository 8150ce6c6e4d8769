# SPDX-License-Identifier: Apache-2.0
"""A process that outlives this one, and clears up what the kernel would keep.

Whatever ends a gateway: its sockets and links go with it, but not what other
processes hold by its programs, or what has no socket of its own any more.
"""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def guard(watch: Callable[[int], None]) -> Iterator[None]:
    """Have a forked process call `watch`, C that never returns, for the time of the body.

    Its argument is the end of a pipe: what reads there is told of this process's
    end, or of the body's. It holds nothing that this process would be missed
    for, and sleeps.
    """
    alive, our_end = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads; the child calls C, which needs none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            os.close(our_end)
            os.setsid()  # what is sent to our group, by a terminal say, is not for it
            watch(alive)
        finally:
            os._exit(1)
    os.close(alive)
    try:
        yield
    finally:
        os.close(our_end)
        os.waitpid(pid, 0)
