/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the verdict program and userspace share: the maps' sizes and structs.
 * build.py hands this same file to cffi, so that Python reads these fields by
 * these names; it may hold integer #defines, structs and enums, nothing else.
 */
#ifndef SOCKGW_SOCKMAP_H
#define SOCKGW_SOCKMAP_H

/* Sizes that userspace raises before the object is loaded. */
#define SOCK_SLOTS_DEFAULT 2
#define SOCK_WORKERS_MAX 256

/* One session takes two neighbouring slots, one for each direction; the
 * slot of the reverse direction is always slot ^ 1.
 */
#define SOCK_SLOT_TO_BACKEND 0
#define SOCK_SLOT_TO_CLIENT 1
#define SOCK_SLOTS_PER_SESSION 2

/* The words of one direction. Each has one writer, and each writer has a cache
 * line of its own: the verdict never waits for userspace, nor the reverse.
 *
 * The counters are never reset: a slot goes on counting from one session to
 * the next, so that a sum over all slots only ever grows. Pairing sets
 * forwarded to passed and the is_ words to 0, while no verdict can run.
 */
struct sock_slot {
	/* Written by the verdict, which the kernel serialises per source. */
	__u64 redirected; /* bytes handed to the target's psock */
	__u64 passed; /* bytes left on the source for userspace */
	__u64 redirected_segments;
	__u64 passed_segments;
	__u32 base; /* the target's write_seq - redirected - forwarded */
	__u32 is_based;
	__u32 next_seq; /* of the source: what the verdict expects to see next */
	__u32 is_sequenced;
	__u32 is_damaged; /* the bytes passed last do not follow those before */
	__u32 verdict_pad[3];

	/* Written by userspace. */
	__u64 forwarded; /* passed bytes that the target's TCP has taken */
	__u32 hold; /* non-zero: pass everything, announce nothing */
	__u32 userspace_pad[13];
};

/* Value of sock_pair_map: what the verdict must know of a source. */
struct sock_pair {
	__u64 peer; /* cookie of the target */
	__u32 slot; /* of the direction that this source feeds */
	__u32 worker; /* whose ring buffer hears of a spill */
};

/* Value of sock_stats: what became of one of the gateway's own connections. */
struct sock_stats {
	__u64 established_ns; /* CLOCK_MONOTONIC */
	__u64 closed_ns; /* 0 while it is open */
	__u32 srtt_us;
	__u32 retransmits;
};

/* Record of a spill ring. */
struct sock_spill {
	__u32 slot;
};

#endif
