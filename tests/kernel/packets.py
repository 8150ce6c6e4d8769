# SPDX-License-Identifier: Apache-2.0
"""TCP packets: seen on their way, taken apart, and made by hand.

Nothing here knows of sessions: numbers and addresses are what a packet says.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

Endpoint = tuple[str, int]

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
MODULUS = 1 << 32

_ETH_BYTES = 14
_ETH_P_ALL = 0x0003
_ETH_P = {socket.AF_INET: 0x0800, socket.AF_INET6: 0x86DD}
_IPV6_BYTES = 40
_TCP_CHECK = slice(16, 18)
_BUFFER_BYTES = 1 << 24
_FRAME_BYTES = 1 << 17

# <linux/if_packet.h>, <linux/socket.h>, <asm/socket.h>
_SOL_PACKET = 263
_PACKET_AUXDATA = 8
_CHECKSUM_NOT_READY = 1 << 3
_SO_RCVBUFFORCE = 33

# <linux/tcp.h>
_END, _NOP, _MSS, _SCALE, _MAY_SACK, _SACK, _STAMPS = 0, 1, 2, 3, 4, 5, 8
_TCP_REPAIR, _TCP_REPAIR_QUEUE, _TCP_QUEUE_SEQ, _TCP_REPAIR_OPTIONS = 19, 20, 21, 22
_TCP_TIMESTAMP, _TCP_REPAIR_WINDOW = 24, 29
_REPAIR, _NO_REPAIR, _NO_REPAIR_NO_PROBE = 1, 0, -1
_RECEIVE_QUEUE, _SEND_QUEUE = 1, 2


class Packet(NamedTuple):
    """A TCP packet as it was seen."""

    family: socket.AddressFamily
    source: Endpoint
    target: Endpoint
    seq: int
    ack: int
    flags: int
    window: int
    """As it is written, in units of the sender's scale."""
    payload: bytes
    ip_header: bytes
    segment: bytes
    """From the TCP header on."""
    is_partial: bool
    """Whether its checksum is still to be completed by a device that it never meets."""
    mss: int = 0
    scale: int | None = None
    may_sack: bool = False
    stamps: tuple[int, int] | None = None
    """What is sent, and what is echoed."""
    edges: tuple[int, ...] = ()
    """Of SACK blocks, left and right in turn."""

    @property
    def end(self) -> int:
        """The sequence number behind it."""
        return (self.seq + len(self.payload) + bool(self.flags & FIN)) % MODULUS

    @property
    def ttl(self) -> int:
        """Or hop limit."""
        return self.ip_header[8 if self.family == socket.AF_INET else 7]


def distance(number: int, base: int) -> int:
    """Return how far behind `base` a sequence number is."""
    return (number - base) % MODULUS


def is_after(one: int, other: int) -> bool:
    """Tell whether one number (of sequence, or a timestamp) is later than the other."""
    return 0 < distance(one, other) < MODULUS // 2


def _sum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _pseudo_header(family: int, hosts: bytes, segment_bytes: int) -> bytes:
    if family == socket.AF_INET:
        return hosts + struct.pack("!HH", socket.IPPROTO_TCP, segment_bytes)
    return hosts + struct.pack("!II", segment_bytes, socket.IPPROTO_TCP)


def has_right_checksums(packet: Packet) -> bool:
    """Tell whether a receiver that computes them takes the packet's checksums."""
    is_v4 = packet.family == socket.AF_INET
    if is_v4 and _sum(packet.ip_header) != 0xFFFF:
        return False
    hosts = packet.ip_header[12:20] if is_v4 else packet.ip_header[8:40]
    pseudo = _pseudo_header(packet.family, hosts, len(packet.segment))
    if packet.is_partial:  # what is there so far is the sum of the pseudo header
        written = int.from_bytes(packet.segment[_TCP_CHECK], "big")
        return written % 0xFFFF == _sum(pseudo) % 0xFFFF
    return _sum(pseudo + packet.segment) == 0xFFFF


def _options(data: bytes) -> dict[str, object]:
    found: dict[str, object] = {}
    while data:
        kind = data[0]
        if kind == _END:
            break
        if kind == _NOP:
            data = data[1:]
            continue
        body, data = data[2 : data[1]], data[data[1] :]
        if kind == _MSS:
            (found["mss"],) = struct.unpack("!H", body)
        elif kind == _SCALE:
            found["scale"] = body[0]
        elif kind == _MAY_SACK:
            found["may_sack"] = True
        elif kind == _SACK:
            found["edges"] = struct.unpack(f"!{len(body) // 4}I", body)
        elif kind == _STAMPS:
            found["stamps"] = struct.unpack("!II", body)
    return found


def _parse(frame: bytes, *, is_partial: bool) -> Packet | None:
    (kind,) = struct.unpack_from("!H", frame, 12)
    data = frame[_ETH_BYTES:]
    if kind == _ETH_P[socket.AF_INET] and data[9] == socket.IPPROTO_TCP:
        if int.from_bytes(data[6:8], "big") & 0x1FFF:
            return None  # a fragment, and not the first
        family, header_bytes, hosts = socket.AF_INET, (data[0] & 15) * 4, data[12:20]
        segment = data[header_bytes : int.from_bytes(data[2:4], "big")]
    elif kind == _ETH_P[socket.AF_INET6] and data[6] == socket.IPPROTO_TCP:
        family, header_bytes, hosts = socket.AF_INET6, _IPV6_BYTES, data[8:40]
        segment = data[header_bytes : header_bytes + int.from_bytes(data[4:6], "big")]
    else:
        return None
    half = len(hosts) // 2
    source, target, seq, ack, offset, flags, window = struct.unpack_from("!HHIIBBH", segment)
    tcp_bytes = (offset >> 4) * 4
    return Packet(
        family,
        (socket.inet_ntop(family, hosts[:half]), source),
        (socket.inet_ntop(family, hosts[half:]), target),
        seq,
        ack,
        flags,
        window,
        segment[tcp_bytes:],
        data[:header_bytes],
        segment,
        is_partial,
        **_options(segment[20:tcp_bytes]),  # type: ignore[arg-type]
    )


class Tap:
    """Sees the TCP packets that pass a device of this thread's namespace."""

    def __init__(self, device: str, family: socket.AddressFamily, *, is_behind: bool) -> None:
        """See what the device sends; or `is_behind`: what has come in, and past all programs.

        A socket for all protocols is shown a packet that comes in before the
        programs at the ingress see it, one for IP afterwards.
        """
        self._is_behind = is_behind
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        self._socket.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
        self._socket.bind((device, _ETH_P[family] if is_behind else _ETH_P_ALL))

    def packets(self) -> list[Packet]:
        """Return those seen since the last call, oldest first."""
        return list(self._packets())

    def _packets(self) -> Iterator[Packet]:
        while True:
            try:
                frame, ancillary, _, address = self._socket.recvmsg(_FRAME_BYTES, 64)
            except BlockingIOError:
                return
            if not self._is_behind and address[2] != socket.PACKET_OUTGOING:
                continue
            status = next(
                struct.unpack_from("=I", data)[0]
                for level, kind, data in ancillary
                if (level, kind) == (_SOL_PACKET, _PACKET_AUXDATA)
            )
            packet = _parse(frame, is_partial=bool(status & _CHECKSUM_NOT_READY))
            if packet is not None:
                yield packet

    def close(self) -> None:
        """Look away."""
        self._socket.close()


def inject(
    source: Endpoint,
    target: Endpoint,
    *,
    seq: int,
    ack: int = 0,
    flags: int,
    window: int = 1 << 15,
    options: bytes = b"",
    payload: bytes = b"",
    ip_options: bytes = b"",
    cut_at: int = 0,
) -> None:
    """Send a TCP packet that nobody's socket has made.

    With `ip_options` in the IPv4 header, or in an IPv6 header of their own; cut into two
    fragments behind so many bytes from the TCP header on.
    """
    family = socket.AF_INET6 if ":" in source[0] else socket.AF_INET
    hosts = socket.inet_pton(family, source[0]) + socket.inet_pton(family, target[0])
    assert len(options) % 4 == len(ip_options) % 4 == cut_at % 8 == 0
    length = 20 + len(options)
    header = struct.pack(
        "!HHIIBBHHH",
        *(source[1], target[1], seq % MODULUS, ack % MODULUS),
        *(length << 2, flags, window, 0, 0),
    )
    segment = bytearray(header + options + payload)
    check = 0xFFFF - _sum(_pseudo_header(family, hosts, len(segment)) + segment)
    segment[_TCP_CHECK] = check.to_bytes(2, "big")
    packet_of = _ipv4_packet if family == socket.AF_INET else _ipv6_packet
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for begin, end in ((0, cut_at), (cut_at, len(segment))) if cut_at else ((0, None),):
            fragment = (begin, end != len(segment)) if cut_at else None
            packet = packet_of(hosts, ip_options, fragment, bytes(segment[begin:end]))
            raw.sendto(packet, (target[0], 0))


_FRAGMENTED_AS = 0x5A17
_IPV6_FRAGMENT, _IPV6_DESTINATION = 44, 60


def _ipv4_packet(
    hosts: bytes, options: bytes, fragment: tuple[int, bool] | None, data: bytes
) -> bytes:
    offset, has_more = fragment or (0, False)
    # The kernel fills in the length and the checksum.
    header = struct.pack(
        "!BBHHHBBH",
        *(0x45 + len(options) // 4, 0, 0, _FRAGMENTED_AS if fragment else 0),
        *(has_more << 13 | offset // 8, 64, socket.IPPROTO_TCP, 0),
    )
    return header + hosts + options + data


def _ipv6_packet(
    hosts: bytes, options: bytes, fragment: tuple[int, bool] | None, data: bytes
) -> bytes:
    kind = socket.IPPROTO_TCP
    if fragment:
        offset, has_more = fragment
        data = struct.pack("!BBHI", kind, 0, offset | has_more, _FRAGMENTED_AS) + data
        kind = _IPV6_FRAGMENT
    if options:
        # One option of kind 0x1e (for experiments, skipped by who does not know it).
        padded = options + bytes(-(len(options) + 4) % 8)
        words = (len(padded) + 4) // 8
        data = struct.pack("!BBBB", kind, words - 1, 0x1E, len(padded)) + padded + data
        kind = _IPV6_DESTINATION
    return struct.pack("!IHBB", 6 << 28, len(data), kind, 64) + hosts + data


# --- sockets in repair mode, tcp(7)'s way to give one the state of another


def _repair(sock: socket.socket, mode: int) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, mode)


def _set(sock: socket.socket, option: int, *words: int) -> None:
    packed = struct.pack(f"={len(words)}I", *(word % MODULUS for word in words))
    sock.setsockopt(socket.IPPROTO_TCP, option, packed)


def begin_at(sock: socket.socket, initial: int) -> None:
    """Give a socket that is not connected yet its initial sequence number."""
    _repair(sock, _REPAIR)
    _set(sock, _TCP_REPAIR_QUEUE, _SEND_QUEUE)
    _set(sock, _TCP_QUEUE_SEQ, initial)
    _repair(sock, _NO_REPAIR_NO_PROBE)


def set_clock(sock: socket.socket, stamp: int) -> None:
    """Have the next timestamp, in ms, be `stamp`; even, because an odd one would be in us."""
    assert stamp % 2 == 0
    _repair(sock, _REPAIR)
    _set(sock, _TCP_TIMESTAMP, stamp)
    _repair(sock, _NO_REPAIR_NO_PROBE)


def clock_of(sock: socket.socket) -> int:
    """Return the timestamp that the socket would send now."""
    packed = sock.getsockopt(socket.IPPROTO_TCP, _TCP_TIMESTAMP, 4)
    stamp: int = struct.unpack("=I", packed)[0]
    return stamp


def probe(sock: socket.socket) -> None:
    """Send what a keep-alive, or the probe of a closed window, is: an old number, and no byte."""
    _repair(sock, _REPAIR)
    _repair(sock, _NO_REPAIR)


def vanish(sock: socket.socket) -> None:
    """Close a socket so that its peer never hears of it."""
    _repair(sock, _REPAIR)
    sock.close()


def options_like(syn: Packet, stamp: int, scale: int) -> bytes:
    """Return the options of a SYN that agrees to all that `syn` offers."""
    assert syn.stamps is not None
    return (
        struct.pack("!BBH", _MSS, 4, syn.mss)
        + struct.pack("!BB", _MAY_SACK, 2)
        + struct.pack("!BBII", _STAMPS, 10, stamp, syn.stamps[0])
        + struct.pack("!BBBB", _NOP, _SCALE, 3, scale)
    )


def forge(own: Endpoint, syn: Packet, initial: int, stamp: int, scale: int) -> socket.socket:
    """Return the socket that would have answered `syn` with these numbers at `own`."""
    sock = socket.socket(syn.family)
    _repair(sock, _REPAIR)
    for queue, number in ((_SEND_QUEUE, initial + 1), (_RECEIVE_QUEUE, syn.seq + 1)):
        _set(sock, _TCP_REPAIR_QUEUE, queue)
        _set(sock, _TCP_QUEUE_SEQ, number)
    sock.bind(own)
    sock.connect(syn.source)
    peer_scale = syn.scale or 0
    _set(
        sock,
        _TCP_REPAIR_OPTIONS,
        *(_MSS, syn.mss),
        *(_SCALE, peer_scale | scale << 16),
        *(_MAY_SACK, 0),
        *(_STAMPS, 0),
    )
    _set(sock, _TCP_TIMESTAMP, stamp)
    window = 1 << 15
    _set(sock, _TCP_REPAIR_WINDOW, syn.seq, window, window, window, syn.seq + 1)
    _repair(sock, _NO_REPAIR_NO_PROBE)
    return sock
