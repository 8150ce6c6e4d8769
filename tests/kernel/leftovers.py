# SPDX-License-Identifier: Apache-2.0
"""What this process holds of the kernel, and what the kernel has, whoever made it."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import socket
import struct
from pathlib import Path

SYSTEM_CALLS = {
    "x86_64": {"close": 3, "connect": 42, "sendto": 44, "seccomp": 317, "bpf": 321},
    "aarch64": {"close": 57, "connect": 203, "sendto": 206, "seccomp": 277, "bpf": 280},
}
"""Their numbers, <asm/unistd.h>, by machine."""
_LIBC = ctypes.CDLL(None, use_errno=True)

# <linux/bpf.h>
_GET_FD_BY_ID = {"prog": 13, "map": 14, "link": 30}
_PROG_QUERY = 16
_TCX_INGRESS = 46
_PROGRAMS_MAX = 64
_COUNT_OFFSET = 24

_ESTABLISHED = "01"


def held() -> tuple[set[str], set[str]]:
    """Return this process's descriptors, and the BPF objects among them."""
    fds, objects = set(), set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            fds.add(f"{entry.name} {entry.readlink()}")
            info = Path("/proc/self/fdinfo", entry.name).read_text()
        except FileNotFoundError:  # the one that lists them
            continue
        objects |= set(re.findall(r"^(?:prog|map|link)_id:\s*\d+$", info, re.MULTILINE))
    return {fd for fd in fds if "/proc/" not in fd}, objects


def _bpf(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    number = SYSTEM_CALLS[platform.machine()]["bpf"]
    result: int = _LIBC.syscall(number, command, attributes, len(attributes))
    return result


def exists(held_object: str) -> bool:
    """Tell whether the kernel still has an object that was among those of `held`."""
    kind, _, number = held_object.partition("_id:")
    attributes = ctypes.create_string_buffer(16)
    struct.pack_into("=I", attributes, 0, int(number))
    fd = _bpf(_GET_FD_BY_ID[kind], attributes)
    if fd >= 0:
        os.close(fd)
        return True
    assert ctypes.get_errno() == errno.ENOENT
    return False


def programs_on(interface: str) -> list[int]:
    """Return the ids of the programs at an interface's ingress, in their order."""
    ids = (ctypes.c_uint * _PROGRAMS_MAX)()
    attributes = ctypes.create_string_buffer(64)
    index = socket.if_nametoindex(interface)
    what = (index, _TCX_INGRESS, 0, 0, ctypes.addressof(ids), len(ids))
    struct.pack_into("=4IQI", attributes, 0, *what)
    if _bpf(_PROG_QUERY, attributes):
        raise OSError(ctypes.get_errno(), "query the programs at an ingress")
    (count,) = struct.unpack_from("=I", attributes, _COUNT_OFFSET)
    return list(ids[:count])


def connections(family: socket.AddressFamily) -> set[tuple[int, int]]:
    """Return the ports, own and peer's, of the established sockets of this thread's namespace."""
    name = "tcp" if family == socket.AF_INET else "tcp6"
    lines = Path("/proc/thread-self/net", name).read_text().splitlines()[1:]
    return {
        (int(own.rpartition(":")[2], 16), int(peer.rpartition(":")[2], 16))
        for _, own, peer, state, *_ in map(str.split, lines)
        if state == _ESTABLISHED
    }


def find_socket(own: tuple[str, int], peer: tuple[str, int]) -> socket.socket:
    """Return a duplicate of this process's socket of that connection, to be closed soon."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            fd = os.dup(int(entry.name))
        except OSError:  # the one that lists them
            continue
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            continue
        try:
            if (sock.getsockname()[:2], sock.getpeername()[:2]) == (own, peer):
                return sock
        except OSError:  # not connected
            pass
        sock.close()
    raise AssertionError(f"no socket from {own} to {peer}")
