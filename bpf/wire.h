/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the wire program and userspace's C share. A session has two ways through
 * it, numbered as sockmap.h numbers them; a leg has the number of the way that
 * its peer sends.
 */
#ifndef SOCKGW_WIRE_H
#define SOCKGW_WIRE_H

/* Sizes that userspace raises before the object is loaded. */
#define WIRE_SESSIONS_DEFAULT 1
#define WIRE_WORKERS_MAX 256

#define WIRE_WAYS 2

enum wire_state {
	WIRE_FREE,
	WIRE_ARMED, /* our sockets have the session; the program watches for the moment */
	WIRE_SWITCHED, /* its packets are translated */
	WIRE_ENDED, /* they were, until both ends were done or one was reset */
	WIRE_UNFIT, /* the moment cannot come any more */
};

/* Who sends to whom, as a packet arrives: network order; of IPv4 the first word. */
struct wire_flow {
	__u32 source[4];
	__u32 target[4];
	__u16 source_port;
	__u16 target_port;
	__u32 family; /* AF_INET or AF_INET6 */
};

/* Value of wire_flows. */
struct wire_leg {
	__u32 session;
	__u32 generation; /* of that place: another session may have it by now */
	__u32 way;
};

/* Value of wire_sessions. Arrays are by way, or by leg. */
struct wire_session {
	struct bpf_spin_lock lock; /* guards state until the switch, and let_through */
	__u32 state; /* enum wire_state */
	__u32 worker; /* whose ring hears of the switch and of the end */
	__u32 generation; /* of this place in the maps: told with each event */
	__u32 is_seen[WIRE_WAYS]; /* a packet has come since the session was armed */
	/* The highest end of sequence that was let through to our socket: what is
	 * beyond its rcv_nxt is on its way there, and must not be overtaken.
	 */
	__u32 let_through[WIRE_WAYS];
	struct wire_flow flows[WIRE_WAYS];
	__u8 peer_scale[WIRE_WAYS]; /* of the window that this leg's peer announces */
	__u8 own_scale[WIRE_WAYS]; /* of the window that we announced to it */
	__u32 has_timestamps;
	__u32 is_computed; /* seq_offset, by an earlier packet */
	__u32 seq_offset[WIRE_WAYS];
	/* Set at the switch. */
	__u64 received[WIRE_WAYS]; /* bytes, by our sockets */
	__u32 time_offset[WIRE_WAYS];
	__u32 ifindex[WIRE_WAYS]; /* where this way's packets leave; 0: up the stack */
};

/* A window as it is told, in units of `scale`; and how large the segments of a sender may be
 * for which that was the largest: at most half of it (tcp_bound_to_half_wnd()).
 */
#define TCP_WINDOW_MAX 65535U
#define WIRE_LEAST(a, b) ((a) < (b) ? (a) : (b))
#define WIRE_TOLD(window, scale) WIRE_LEAST(window, TCP_WINDOW_MAX << (scale))
#define WIRE_SEGMENT(window, scale, mss) WIRE_LEAST(WIRE_TOLD(window, scale) / 2, mss)

/* How large segments to a receiver may be, if ours are of `mss` bytes: as large, by and
 * large. Into a window that is smaller than a segment its sender would send nothing before
 * a timer says so, 200 ms later, again and again.
 */
#define WIRE_SEGMENT_MOST(mss) ((mss) + (mss) / 8)

/* What is counted and kept of one way; userspace reads it by mmap. The counters
 * are never reset: a sum over all slots only ever grows.
 */
struct wire_slot {
	/* Written by the program. */
	__u64 bytes; /* of payload, each once */
	__u64 packets;
	__u64 seen_ns; /* the last packet, CLOCK_MONOTONIC_COARSE */
	__u64 moved_ns; /* the last new payload */
	__u32 end; /* highest sequence number sent, as its sender counts */
	__u32 acked; /* what its sender has acknowledged last, as the other end counts */
	__u32 fin_end; /* the number behind its FIN */
	__u32 has_fin;
	__u32 fins_acked; /* of a session's first slot: a bit for each way */
	__u32 has_reset; /* its sender has reset the session */
	__u32 is_reused; /* its sender has begun another session on the same ports */
	__u32 is_claimed; /* of a session's first slot: who sets it removes the flows */
	__u32 is_too_long; /* a packet was; until userspace has told its sender */
	__u32 too_long_seq; /* its number, as its sender counts */
	__u32 mtu; /* of where it would have left */
	__u32 program_pad[4];

	/* Written by userspace. */
	__u32 hold; /* of a session's first slot: do not switch */
	__u32 generation; /* of a session's first slot: how often it was armed */
	__u32 is_chatty; /* of a session's first slot: it never sends much at once */
	__u32 most_told; /* the largest window that our socket has told this way's sender */
	/* Where this way's packets leave, if the route has changed since the switch: an
	 * interface, and above it the generation that it is meant for; one word, so
	 * that nobody reads half of it.
	 */
	__u64 route;
	__u64 counted_before; /* bytes, when the session was armed */
	__u64 copied; /* bytes of this way before the switch */
	__u64 started_ns; /* of a session's first slot: CLOCK_MONOTONIC */
	__u64 userspace_pads[2];
};

/* Why a session does not go by wire. */
enum wire_unfit {
	WIRE_FITS,
	WIRE_TIMESTAMPS, /* on one leg only; so with the next three */
	WIRE_WINDOW_SCALING,
	WIRE_SACK,
	WIRE_ECN,
	WIRE_MSS, /* what one side may send is too large for the other */
	WIRE_MIXED_LEGS, /* one peer is on this host, the other is not */
	WIRE_MIXED_FAMILIES, /* one leg is IPv4, the other IPv6 */
	WIRE_LINK_LOCAL, /* an address needs a scope */
	WIRE_XFRM, /* IPsec: a leg is encrypted or encapsulated, or may be next */
	WIRE_IP_OPTIONS, /* or IPv6 extension headers */
	WIRE_FRAGMENTS,
	WIRE_MPTCP, /* a leg may have several ways */
	WIRE_NO_ROOM, /* in the maps */
	WIRE_NO_MOMENT, /* something was always in flight */
	WIRE_NOT_ESTABLISHED, /* an end was reset or has sent its FIN */
};

enum wire_happening {
	WIRE_HAS_SWITCHED,
	WIRE_HAS_ENDED,
	WIRE_IS_UNFIT,
	WIRE_IS_TOO_LONG,
};

/* Record of a wire ring. */
struct wire_event {
	__u32 session;
	__u32 generation;
	__u16 happening;
	__u16 detail; /* of WIRE_IS_UNFIT, enum wire_unfit; of WIRE_IS_TOO_LONG, whose way */
};

#endif
